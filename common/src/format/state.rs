//! Sender state files: page hashes and journal. (being written)
