//! First start: errors name path, setting and remedy, and the CA has one location from any working directory.

use crate::proxy::Program;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

const LISTEN: [&str; 4] = ["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"];

fn started(words: &[&str], here: &Path, variables: &[(&str, &Path)]) -> Program {
    let variables: Vec<_> = variables
        .iter()
        .map(|(name, value)| ((*name).to_owned(), value.to_str().unwrap().to_owned()))
        .collect();
    Program::start(words, here, &variables)
}

/// The error of a start that fails with this exit code.
async fn refusal(here: &Path, variables: &[(&str, &Path)], code: i32) -> String {
    let mut program = started(&[&["serve"], &LISTEN[..]].concat(), here, variables);
    assert_eq!(program.exit().await, Some(code), "{}", program.stderr());
    program.stderr().lines().last().unwrap().to_owned()
}

#[tokio::test]
async fn read_only_data_folder_error_names_the_setting() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let cases = [
        (Path::new("/proc/x"), "/proc/x: "),
        (Path::new("/proc/x/y/z"), "/proc/x: "),
        (&*file, "not a directory; a file is in the way"),
        (&*file.join("below"), "not a directory; a file is in the way"),
    ];
    for (data, wanted) in cases {
        let said = refusal(folder.path(), &[("IFNEWER_DATA", data)], 1).await;
        let shown = data.display().to_string();
        for part in [
            "the data folder",
            &shown,
            wanted,
            "`data`",
            "--data",
            "IFNEWER_DATA",
        ] {
            assert!(said.contains(part), "{part}: {said}");
        }
    }
    // The same error for a file in it that cannot be written.
    let data = folder.path().join("data");
    std::fs::create_dir_all(data.join("LOCK")).unwrap();
    let said = refusal(folder.path(), &[("IFNEWER_DATA", &data)], 1).await;
    assert!(
        said.contains("data/LOCK: is a directory") && said.contains("`data`"),
        "{said}"
    );
}

#[tokio::test]
async fn read_only_certs_folder_error_names_the_setting() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let certs = Path::new("/proc/certs");
    let said = refusal(
        folder.path(),
        &[("IFNEWER_DATA", &data), ("IFNEWER_TLS_FOLDER", certs)],
        2,
    )
    .await;
    for part in ["/proc/certs", "[tls] folder", "IFNEWER_TLS_FOLDER"] {
        assert!(said.contains(part), "{part}: {said}");
    }
}

#[tokio::test]
async fn o05_ca_is_the_same_wherever_the_program_is_started() {
    let folder = tempfile::tempdir().unwrap();
    let (data, one, other) = (
        folder.path().join("data"),
        folder.path().join("one"),
        folder.path().join("other"),
    );
    for here in [&one, &other] {
        std::fs::create_dir(here).unwrap();
    }
    let variables = [("IFNEWER_DATA", &*data)];
    let serve = [&["serve"], &LISTEN[..]].concat();
    let mut program = started(&serve, &one, &variables);
    program.announced("admin listening on ").await;
    program.terminate();
    program.exit().await;
    let pem = std::fs::read_to_string(data.join("certs/ca.pem")).unwrap();
    assert!(!one.join("certs").exists());

    let mut export = started(&["ca", "export"], &other, &variables);
    assert_eq!(export.exit().await, Some(0), "{}", export.stderr());
    assert_eq!(export.stdout().trim(), pem.trim());
    // A checkout has a folder `certs`.
    std::fs::create_dir(other.join("certs")).unwrap();
    let mut program = started(&serve, &other, &variables);
    program.announced("admin listening on ").await;
    program.terminate();
    program.exit().await;
    assert!(other.join("certs/ca.pem").exists());
}

#[tokio::test]
async fn first_start_in_checkout_generates_ca_beside_certs_readme() {
    let folder = tempfile::tempdir().unwrap();
    let (data, certs) = (folder.path().join("data"), folder.path().join("certs"));
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("certs/README.md");
    std::fs::create_dir(&certs).unwrap();
    std::fs::copy(&readme, certs.join("README.md")).unwrap();
    let serve = [&["serve"], &LISTEN[..]].concat();
    let mut authorities = Vec::new();
    // The second start finds the README, the CA and the server certificate.
    for _ in 0..2 {
        let mut program = started(&serve, folder.path(), &[("IFNEWER_DATA", &data)]);
        program.announced("admin listening on ").await;
        program.terminate();
        program.exit().await;
        authorities.push(std::fs::read(certs.join("ca.pem")).unwrap());
    }
    assert_eq!(authorities[0], authorities[1], "the CA is generated once");
    assert!(!data.join("certs").exists(), "no second CA in the data folder");
    let mode = std::fs::metadata(certs.join("ca.key"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let described = std::fs::read_to_string(&readme).unwrap();
    for entry in std::fs::read_dir(&certs).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let is_described = name == "README.md" || described.contains(&format!("`{name}`"));
        assert!(is_described, "certs/README.md does not describe {name}");
    }
}
