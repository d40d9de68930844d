//! What jemalloc, the allocator of every binary (RocksDB included), is told: keep resident memory close to what is in use.
//!
//! jemalloc reads the symbol `malloc_conf` before anything else runs. By default it keeps four arenas for each CPU, and freed
//! memory in each of them for ten seconds in case it is wanted again. A receiver moves records of up to 256 KiB at hundreds
//! of MiB a second between threads, so what it had freed was soon as much as what it used: with a budget of 128 MiB and
//! eight volumes its resident memory peaked at 165 MiB, and with these settings at 90 MiB, in the same time. Giving memory
//! back at once (no decay) takes another 20 MiB off that and doubles the CPU time.

/// Defines the symbol in a binary, where [`tikv_jemallocator`](https://docs.rs/tikv-jemallocator) is the global allocator: two
/// arenas, of which the freed memory goes back to the kernel within a second, by a thread in the background.
///
/// A macro, since jemalloc has a weak symbol of the same name: a library's would only sometimes be linked in its place.
#[macro_export]
macro_rules! configure_jemalloc {
    () => {
        #[expect(unsafe_code, reason = "the allocator looks for a symbol of this name")]
        // SAFETY: jemalloc declares `const char *malloc_conf`; a thin reference to bytes that end with a zero is one.
        #[unsafe(export_name = "malloc_conf")]
        static JEMALLOC: &[u8; 70] = b"narenas:2,dirty_decay_ms:1000,muzzy_decay_ms:0,background_thread:true\0";
    };
}
