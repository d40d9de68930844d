//! Bytes on the wire, and what hostile ones come to.

#![expect(clippy::cast_possible_truncation, reason = "numbers of tests are small, or cut on purpose")]

use proptest::prelude::*;

use super::*;

const DISK: u64 = 10 << 20;

fn exports(names: &[&str]) -> Vec<ExportFacts> {
    names.iter().map(|name| ExportFacts { name: (*name).to_owned(), disk_bytes: DISK, read_only: false }).collect()
}

fn option(kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

fn go(kind: u32, name: &str, requests: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&(requests.len() as u16).to_be_bytes());
    requests.iter().for_each(|request| data.extend_from_slice(&request.to_be_bytes()));
    option(kind, &data)
}

/// A handshake after the client's flags.
fn begun(names: &[&str], flags: u32) -> Handshake {
    let mut handshake = Handshake::new(exports(names));
    let flags = handshake.handle(&flags.to_be_bytes(), &mut Vec::new());
    assert_eq!(flags, Ok((4, HandshakeStep::More)));
    handshake
}

fn said(handshake: &mut Handshake, input: &[u8]) -> (Vec<u8>, HandshakeStep) {
    let mut out = Vec::new();
    let (consumed, step) = handshake.handle(input, &mut out).expect("in order");
    assert_eq!(consumed, input.len());
    (out, step)
}

/// Kinds of the replies in `out`, with their data.
fn replies(mut out: &[u8]) -> Vec<(u32, Vec<u8>)> {
    let mut found = Vec::new();
    while !out.is_empty() {
        assert_eq!(be_u64(&out[..8]), OPTION_REPLY_MAGIC);
        let length = be_u32(&out[16..20]) as usize;
        found.push((be_u32(&out[12..16]), out[20..20 + length].to_vec()));
        out = &out[20 + length..];
    }
    found
}

#[test]
fn the_greeting_is_the_fixed_newstyle_one() {
    assert_eq!(&Handshake::greeting(), b"NBDMAGICIHAVEOPT\x00\x03");
}

#[test]
fn go_tells_size_flags_and_block_sizes_and_ends_the_handshake() {
    let mut handshake = begun(&["a", "b"], 3);
    let (out, step) = said(&mut handshake, &option(OPT_STRUCTURED_REPLY, &[]));
    assert_eq!((replies(&out), step), (vec![(REP_ACK, vec![])], HandshakeStep::More));
    let (out, step) = said(&mut handshake, &go(OPT_GO, "b", &[INFO_BLOCK_SIZE, INFO_NAME, 77]));
    assert_eq!(step, HandshakeStep::Go(Negotiated { name: "b".to_owned(), structured: true }));
    let out = replies(&out);
    let mut facts = vec![0, 0];
    facts.extend_from_slice(&DISK.to_be_bytes());
    // Has flags, flush, FUA, trim, write zeroes, don't fragment, several connections.
    facts.extend_from_slice(&0b1_1110_1101_u16.to_be_bytes());
    assert_eq!(out[0], (REP_INFO, facts));
    assert_eq!(out[1], (REP_INFO, vec![0, 1, b'b']));
    assert_eq!(out[2], (REP_INFO, vec![0, 3, 0, 0, 0, 1, 0, 0, 0x10, 0, 2, 0, 0, 0]));
    assert_eq!(out[3], (REP_ACK, vec![]));
}

#[test]
fn info_goes_on_a_list_names_all_and_what_is_unknown_is_said_to_be() {
    let mut handshake = begun(&["a", "b"], 1);
    let (out, _) = said(&mut handshake, &option(OPT_LIST, &[]));
    let names = vec![(REP_SERVER, vec![0, 0, 0, 1, b'a']), (REP_SERVER, vec![0, 0, 0, 1, b'b']), (REP_ACK, vec![])];
    assert_eq!(replies(&out), names);
    let (out, step) = said(&mut handshake, &go(OPT_INFO, "a", &[]));
    assert_eq!((replies(&out).len(), step), (2, HandshakeStep::More));
    for (input, expected) in [
        (go(OPT_GO, "c", &[]), REP_ERR_UNKNOWN),
        (go(OPT_GO, "", &[]), REP_ERR_UNKNOWN),
        (option(OPT_GO, &[0, 0, 0, 9, 1]), REP_ERR_INVALID),
        (option(OPT_GO, &[]), REP_ERR_INVALID),
        (option(OPT_LIST, &[1]), REP_ERR_INVALID),
        (option(5, &[]), REP_ERR_UNSUP),
        (option(10, &[1, 2, 3]), REP_ERR_UNSUP),
    ] {
        let (out, step) = said(&mut handshake, &input);
        assert_eq!((replies(&out)[0].0, step), (expected, HandshakeStep::More));
    }
    let (out, step) = said(&mut handshake, &option(OPT_ABORT, &[]));
    assert_eq!((replies(&out)[0].0, step), (REP_ACK, HandshakeStep::Abort));
}

#[test]
fn the_empty_name_is_the_only_export_and_export_name_answers_in_its_own_way() {
    let chosen = |name: &str| Negotiated { name: name.to_owned(), structured: false };
    let (_, step) = said(&mut begun(&["only"], 3), &go(OPT_GO, "", &[]));
    assert_eq!(step, HandshakeStep::Go(chosen("only")));
    let (out, step) = said(&mut begun(&["only"], 3), &option(OPT_EXPORT_NAME, b"only"));
    assert_eq!((out.len(), step), (10, HandshakeStep::Go(chosen("only"))));
    let (out, _) = said(&mut begun(&["only"], 1), &option(OPT_EXPORT_NAME, b""));
    assert_eq!(out.len(), 134, "with 124 zeros for clients that did not decline them");
    let unknown = begun(&["only"], 3).handle(&option(OPT_EXPORT_NAME, b"other"), &mut Vec::new());
    assert_eq!(unknown, Err(ProtocolError::UnknownExport { name: "other".to_owned() }));
}

#[test]
fn a_read_only_export_says_so_and_offers_nothing_that_writes() {
    let mut facts = exports(&["only"]);
    facts[0].read_only = true;
    let mut handshake = Handshake::new(facts);
    assert_eq!(handshake.handle(&[0, 0, 0, 3], &mut Vec::new()), Ok((4, HandshakeStep::More)));
    let (out, _) = said(&mut handshake, &option(OPT_EXPORT_NAME, b""));
    assert_eq!(out[8..10], [0b1, 0b111], "has flags, is read-only, takes flushes, several connections see the same");
}

#[test]
fn wrong_magics_flags_and_lengths_end_the_connection() {
    let mut out = Vec::new();
    let flags = Handshake::new(exports(&["a"])).handle(&[0, 0, 0, 4], &mut out);
    assert_eq!(flags, Err(ProtocolError::Flags { found: 4 }));
    let magic = begun(&["a"], 3).handle(&[0; 16], &mut out);
    assert!(matches!(magic, Err(ProtocolError::Magic { found: 0, .. })));
    let mut long = option(OPT_GO, &[]);
    long[12..].copy_from_slice(&u32::MAX.to_be_bytes());
    assert!(matches!(begun(&["a"], 3).handle(&long, &mut out), Err(ProtocolError::TooLong { .. })));
    let mut handshake = begun(&["a"], 3);
    let mut ask = || handshake.handle(&option(OPT_LIST, &[]), &mut Vec::new());
    assert!((0..1024).all(|_| ask().is_ok()));
    assert_eq!(ask(), Err(ProtocolError::TooManyOptions));
    assert!(out.is_empty());
}

fn request(flags: u16, kind: u16, offset: u64, length: u32) -> [u8; REQUEST_BYTES] {
    let mut bytes = [0; REQUEST_BYTES];
    bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&9_u64.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..].copy_from_slice(&length.to_be_bytes());
    bytes
}

#[test]
fn requests_beyond_the_disk_or_with_flags_that_make_no_sense_get_their_error() {
    let parse = |flags, kind, offset, length| {
        Request::parse(&request(flags, kind, offset, length), DISK, true).expect("in step").command
    };
    assert_eq!(parse(0, 0, DISK - 1, 1), Ok(Command::Read { offset: DISK - 1, length: 1 }));
    assert_eq!(parse(0, 0, DISK, 1), Err(Errno::Invalid));
    assert_eq!(parse(0, 0, u64::MAX, 2), Err(Errno::Invalid));
    assert_eq!(parse(1, 1, 0, 5), Ok(Command::Write { offset: 0, length: 5, fua: true }));
    assert_eq!(parse(0, 1, DISK - 1, 2), Err(Errno::NoSpace));
    assert_eq!(parse(0, 6, DISK - 1, 2), Err(Errno::NoSpace));
    assert_eq!(parse(0, 4, DISK - 1, 2), Err(Errno::Invalid));
    assert_eq!(parse(2, 6, 0, 9), Ok(Command::WriteZeroes { offset: 0, length: 9, fua: false, may_punch: false }));
    assert_eq!(parse(16, 6, 0, 9), Err(Errno::Invalid), "fast zero was not offered");
    assert_eq!(parse(4, 0, 0, 9), Ok(Command::Read { offset: 0, length: 9 }));
    assert_eq!(parse(4, 1, 0, 9), Err(Errno::Invalid));
    assert_eq!(parse(0, 3, 0, 0), Ok(Command::Flush));
    assert_eq!(parse(0, 7, 0, 1), Err(Errno::Invalid), "block status was not offered");
    assert_eq!(parse(0, 0, 0, 0), Err(Errno::Invalid));
    let plain = Request::parse(&request(4, 0, 0, 1), DISK, false).expect("in step");
    assert_eq!(plain.command, Err(Errno::Invalid), "don't fragment without structured replies");
    let long = Request::parse(&request(0, 1, 0, PAYLOAD_BYTES_MAX + 1), DISK, false);
    assert!(matches!(long, Err(ProtocolError::TooLong { .. })));
}

#[test]
fn replies_have_the_protocols_bytes() {
    assert_eq!(simple_reply(5, None), [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5]);
    assert_eq!(simple_reply(5, Some(Errno::NoSpace))[4..8], [0, 0, 0, 28]);
    let chunk = data_chunk(5, 7, 4096, true);
    assert_eq!(chunk[..8], [0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1]);
    assert_eq!(chunk[16..], [0, 0, 0x10, 8, 0, 0, 0, 0, 0, 0, 0, 7]);
    assert_eq!(data_chunk(5, 7, 4096, false)[4..6], [0, 0]);
    let error = error_chunk(5, Errno::Io);
    assert_eq!(error[4..8], [0, 1, 0x80, 1]);
    assert_eq!(error[16..], [0, 0, 0, 6, 0, 0, 0, 5, 0, 0]);
}

/// Messages that a client could send, sound or not.
fn message() -> impl Strategy<Value = Vec<u8>> {
    let name = prop_oneof!["[a-c]{0,2}", "[a-z]{0,40}"];
    let kind = prop_oneof![0_u32..12, any::<u32>()];
    prop_oneof![
        (kind, prop::collection::vec(any::<u8>(), 0..64)).prop_map(|(kind, data)| option(kind, &data)),
        (name, prop::collection::vec(0_u16..5, 0..6), prop::bool::ANY).prop_map(|(name, asked, info)| go(
            if info { OPT_INFO } else { OPT_GO },
            &name,
            &asked
        )),
        prop::collection::vec(any::<u8>(), 0..40),
    ]
}

proptest! {
    #[test]
    fn whatever_a_client_sends_the_handshake_stays_within_its_bounds(
        flags in prop_oneof![0_u32..4, any::<u32>()],
        messages in prop::collection::vec(message(), 0..12),
        cuts in prop::collection::vec(1_usize..50, 1..40),
    ) {
        let input: Vec<u8> = flags.to_be_bytes().into_iter().chain(messages.concat()).collect();
        // At once, and in pieces: the same replies and the same end.
        let run = |pieces: &mut dyn Iterator<Item = usize>| {
            let mut handshake = Handshake::new(exports(&["a", "b"]));
            let (mut out, mut there, mut start) = (Vec::new(), 0, 0);
            loop {
                match handshake.handle(&input[start..there], &mut out) {
                    Ok((0, HandshakeStep::More)) if there == input.len() => return (out, Ok(HandshakeStep::More)),
                    Ok((0, HandshakeStep::More)) => there = input.len().min(there + pieces.next().unwrap_or(1)),
                    Ok((consumed, HandshakeStep::More)) => start += consumed,
                    Ok((_, step)) => return (out, Ok(step)),
                    Err(error) => return (out, Err(error)),
                }
                assert!(start <= there);
            }
        };
        let whole = run(&mut std::iter::once(input.len()));
        let pieces = run(&mut cuts.iter().copied().cycle());
        prop_assert_eq!(&whole, &pieces);
        prop_assert!(whole.0.len() <= 200 * (messages.len() + 1) + 20);
    }

    #[test]
    fn a_request_that_is_found_valid_lies_within_the_disk(
        mut bytes in any::<[u8; REQUEST_BYTES]>(),
        small in prop::bool::ANY,
        kind in 0_u16..9,
        disk in 1_u64..1 << 40,
        structured in prop::bool::ANY,
    ) {
        bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        if small {
            bytes[4] = 0;
            bytes[5] &= 7;
            bytes[6..8].copy_from_slice(&kind.to_be_bytes());
            bytes[16..19].fill(0);
            bytes[24] = 0;
        }
        if let Ok(request) = Request::parse(&bytes, disk, structured) {
            prop_assert!(request.payload <= PAYLOAD_BYTES_MAX);
            match request.command {
                Ok(Command::Read { offset, length } | Command::Write { offset, length, .. }) => {
                    prop_assert!(length > 0 && length <= PAYLOAD_BYTES_MAX);
                    prop_assert!(offset + u64::from(length) <= disk);
                }
                Ok(Command::Trim { offset, length, .. } | Command::WriteZeroes { offset, length, .. }) => {
                    prop_assert!(length > 0 && offset + u64::from(length) <= disk);
                }
                _ => {}
            }
        }
    }
}
