//! Test disks: a file system in an image file or in memory, mounted at the data folder.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A mounted file system. Dropping it unmounts it.
pub struct Disk {
    at: PathBuf,
    image: Option<PathBuf>,
}

impl Disk {
    /// Creates a file system of this kind in the file `image` and mounts it at `at`. Options for mkfs may follow the
    /// kind.
    pub fn in_file(kind: &str, image: PathBuf, at: &Path, bytes: u64) -> Result<Disk, String> {
        std::fs::File::create(&image).unwrap().set_len(bytes).unwrap();
        let (kind, options) = kind.split_once(' ').unwrap_or((kind, ""));
        let force = if kind == "xfs" { "-f" } else { "-F" };
        let mut arguments = vec!["-q", force];
        arguments.extend(options.split_whitespace());
        arguments.push(image.to_str().unwrap());
        run(&format!("mkfs.{kind}"), &arguments)?;
        let disk = Disk {
            at: at.to_owned(),
            image: Some(image),
        };
        std::fs::create_dir_all(at).unwrap();
        disk.mount()?;
        Ok(disk)
    }

    /// Mounts a tmpfs of this size.
    pub fn in_memory(at: &Path, bytes: u64) -> Result<Disk, String> {
        std::fs::create_dir_all(at).unwrap();
        run(
            "mount",
            &[
                "-t",
                "tmpfs",
                "-o",
                &format!("size={bytes},mode=700"),
                "tmpfs",
                at.to_str().unwrap(),
            ],
        )?;
        Ok(Disk {
            at: at.to_owned(),
            image: None,
        })
    }

    pub fn mount(&self) -> Result<(), String> {
        let image = self.image.as_ref().unwrap().to_str().unwrap();
        run("mount", &["-o", "loop", image, self.at.to_str().unwrap()])
    }

    pub fn unmount(&self) -> Result<(), String> {
        run("umount", &[self.at.to_str().unwrap()])
    }

    pub fn remount(&self, options: &str) -> Result<(), String> {
        run(
            "mount",
            &["-o", &format!("remount,{options}"), self.at.to_str().unwrap()],
        )
    }

    /// Cuts the power: data that was not durable is lost, and every later call fails with an I/O error. The ioctl is
    /// that of XFS, which ext4 adopted with its number; 2 is "do not flush the log".
    pub fn cut(&self) -> Result<(), String> {
        let shut = "import fcntl,os,struct,sys; fcntl.ioctl(os.open(sys.argv[1],os.O_RDONLY),0x8004587d,struct.pack('I',2))";
        run("python3", &["-c", shut, self.at.to_str().unwrap()])
    }

    pub fn at(&self) -> &Path {
        &self.at
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = run("umount", &["-l", self.at.to_str().unwrap()]);
        if let Some(image) = &self.image {
            let _ = std::fs::remove_file(image);
        }
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<(), String> {
    let done = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{program}: {error}"))?;
    if done.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&done.stderr).trim().to_owned();
    Err(format!("{program} {}: {said}", arguments.join(" ")))
}
