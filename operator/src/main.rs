//! `blockferry`: the operator's tool. Needs the object store and a key, never a running receiver.

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;
common::configure_jemalloc!();

fn main() -> std::process::ExitCode {
    blockferry_operator::cli::main()
}
