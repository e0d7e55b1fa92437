//! The program inside the test images: says which version of the image it was started from.
//! Built as one static file, because an image without a loader cannot run anything else.

fn main() {
    let version = std::fs::read_to_string("/version").unwrap_or_else(|e| format!("no /version in this image: {e}"));
    println!("{}", version.trim_end());
}
