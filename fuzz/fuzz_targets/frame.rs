//! Frames off a stream: taken one by one until one is refused; each encodes to the bytes it was taken from. How the bytes come in
//! portions makes no difference.
#![no_main]

use blockferry_fuzz::fix_frames;
use bytes::BytesMut;
use common::format::frame::{Frame, check_preamble};
use libfuzzer_sys::fuzz_target;

fn take_all(data: &[u8]) -> Vec<Frame> {
    let mut buffer = BytesMut::from(data);
    let mut frames = Vec::new();
    let mut at = 0;
    while let Ok(Some(frame)) = Frame::take(&mut buffer) {
        let end = data.len() - buffer.len();
        let (head, payload) = frame.encode();
        let encoded = [head, payload.unwrap_or_default()].concat();
        assert_eq!(encoded, data[at..end]);
        at = end;
        frames.push(frame);
    }
    frames
}

fn check(data: &[u8]) {
    let frames = take_all(data);
    // The same, half at first.
    let (first, second) = data.split_at(data.len() / 2);
    let mut buffer = BytesMut::from(first);
    let mut again = Vec::new();
    let mut refused = false;
    for more in [&[][..], second] {
        buffer.extend_from_slice(more);
        while !refused {
            match Frame::take(&mut buffer) {
                Ok(Some(frame)) => again.push(frame),
                Ok(None) => break,
                Err(_) => refused = true,
            }
        }
    }
    assert_eq!(again, frames);
}

fuzz_target!(|data: &[u8]| {
    if let Some(preamble) = data.first_chunk() {
        let _ = check_preamble(*preamble);
    }
    check(data);
    let mut fixed = data.to_vec();
    fix_frames(&mut fixed);
    check(&fixed);
});
