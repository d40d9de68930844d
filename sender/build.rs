//! Compiles the BPF programs with clang, and links libbpf. The programs' object is embedded in the library.

use std::path::PathBuf;
use std::process::Command;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    let object = out.join("tracker.bpf.o");
    let clang = std::env::var_os("CLANG").unwrap_or_else(|| "clang".into());
    for file in ["bpf/tracker.bpf.c", "bpf/kernel.h"] {
        println!("cargo:rerun-if-changed={file}");
    }
    println!("cargo:rerun-if-env-changed=CLANG");
    // -g is for BTF, without which nothing can be relocated. v3: atomic operations. Without the compilation directory the path
    // of this checkout would be in the object, and its digest would depend on it.
    let result = Command::new(&clang)
        .args(["-target", "bpf", "-mcpu=v3", "-O2", "-g", "-Wall", "-Werror", "-fdebug-compilation-dir=."])
        .args(["-Ibpf", "-c", "bpf/tracker.bpf.c", "-o"])
        .arg(&object)
        .output();
    let output =
        result.map_err(|error| format!("{}: {error}; the BPF programs need clang 11 or newer", clang.display()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let needs = "clang 11 or newer, and libbpf-dev for bpf/bpf_helpers.h";
        return Err(format!("bpf/tracker.bpf.c did not compile (it needs {needs}):\n{said}").into());
    }
    // libbpf itself goes into the binary, so that a protected machine needs no particular release of it; the two libraries
    // under it are part of every distribution's base system.
    println!("cargo:rustc-link-lib=static:-bundle=bpf");
    println!("cargo:rustc-link-lib=dylib=elf");
    println!("cargo:rustc-link-lib=dylib=z");
    Ok(())
}
