//! Program of the test images: prints the version of its image. It is a static binary, because the images have no
//! loader.

fn main() {
    let version = std::fs::read_to_string("/version").unwrap_or_else(|e| format!("no /version in this image: {e}"));
    println!("{}", version.trim_end());
}
