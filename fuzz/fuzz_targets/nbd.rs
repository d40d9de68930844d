//! An NBD client of any kind, against the server's half: the handshake takes no more than it was given, in whatever portions it comes,
//! and answers within bounds; a request that is found valid lies within the disk.
#![no_main]

use common::nbd::{
    Command, ExportFacts, Handshake, HandshakeStep, Negotiated, OPTION_BYTES_MAX, PAYLOAD_BYTES_MAX, REQUEST_BYTES,
    Request,
};
use libfuzzer_sys::fuzz_target;

const DISK_BYTES: u64 = (1 << 30) + 512;

fn exports(read_only: bool) -> Vec<ExportFacts> {
    ["root", "data"].map(|name| ExportFacts { name: name.to_owned(), disk_bytes: DISK_BYTES, read_only }).into()
}

/// What came of a handshake over `data`, of which no more than `portion` new bytes are seen at a time: the choice, what was said, and
/// the bytes left.
fn shake_hands(data: &[u8], portion: usize) -> (Option<Negotiated>, Vec<u8>, &[u8]) {
    let mut handshake = Handshake::new(exports(portion % 2 == 0));
    let (mut out, mut start, mut end) = (Vec::new(), 0, 0);
    loop {
        let Ok((consumed, step)) = handshake.handle(&data[start..end], &mut out) else { return (None, out, &[]) };
        assert!(consumed <= end - start);
        start += consumed;
        match step {
            HandshakeStep::Go(chosen) => return (Some(chosen), out, &data[start..]),
            HandshakeStep::Abort => return (None, out, &[]),
            HandshakeStep::More if consumed == 0 => {
                assert!(end - start <= OPTION_BYTES_MAX + 16, "it waits for more than an option can have");
                if end == data.len() {
                    return (None, out, &[]);
                }
                end = data.len().min(end + portion);
            }
            HandshakeStep::More => {}
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let (chosen, said, rest) = shake_hands(data, 4096);
    assert_eq!(shake_hands(data, 2), (chosen.clone(), said.clone(), rest));
    // 1,024 options at most, each of which is answered with less than a kilobyte.
    assert!(said.len() <= 1 << 20);
    let structured = chosen.is_some_and(|chosen| {
        assert!(["root", "data"].contains(&chosen.name.as_str()));
        chosen.structured
    });
    for header in rest.as_chunks::<REQUEST_BYTES>().0.iter().chain(data.as_chunks::<REQUEST_BYTES>().0) {
        let Ok(request) = Request::parse(header, DISK_BYTES, structured) else { continue };
        assert!(request.payload <= PAYLOAD_BYTES_MAX);
        let (offset, length) = match request.command {
            Ok(Command::Read { offset, length } | Command::Write { offset, length, .. }) => {
                assert!(length <= PAYLOAD_BYTES_MAX);
                (offset, length)
            }
            Ok(Command::Trim { offset, length, .. } | Command::WriteZeroes { offset, length, .. }) => (offset, length),
            Ok(Command::Flush | Command::Disconnect) | Err(_) => continue,
        };
        assert!(length > 0 && offset + u64::from(length) <= DISK_BYTES);
    }
});
