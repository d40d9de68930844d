//! Compiles `proto/` to Rust without a system protoc.

#[cfg(not(feature = "rim"))]
fn main() {}

#[cfg(feature = "rim")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = "../proto";
    let files = ["../proto/blockferry/v1/control.proto"];
    println!("cargo::rerun-if-changed={root}");
    let descriptors = protox::compile(files, [root])?;
    tonic_prost_build::configure()
        .bytes(".blockferry.v1")
        .emit_rerun_if_changed(false)
        // Secrets never reach a log through a derived Debug.
        .skip_debug(["blockferry.v1.RegisterRequest"])
        .compile_fds(descriptors)?;
    Ok(())
}
