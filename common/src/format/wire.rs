//! Little-endian writer and bounds-checked reader that all formats are built from.

use super::FormatError;

/// Appends fixed-width little-endian values.
#[derive(Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// A writer with room for `capacity` bytes.
    #[must_use]
    pub fn with_capacity(capacity: usize) -> Self {
        Self { bytes: Vec::with_capacity(capacity) }
    }

    /// Appends one byte.
    pub fn u8(&mut self, value: u8) -> &mut Self {
        self.bytes.push(value);
        self
    }

    /// Appends a `u16`.
    pub fn u16(&mut self, value: u16) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// Appends a `u32`.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// Appends a `u64`.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// Appends an `i64`.
    pub fn i64(&mut self, value: i64) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// Appends bytes as they are.
    pub fn raw(&mut self, value: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(value);
        self
    }

    /// Appends a `u32` length and the bytes.
    ///
    /// # Panics
    /// If the bytes are over 4 GiB, which no caller within [`crate::limits`] has.
    pub fn block(&mut self, value: &[u8]) -> &mut Self {
        self.count(value.len()).raw(value)
    }

    /// Appends a `u32` count of elements that follow.
    ///
    /// # Panics
    /// If the count does not fit 32 bits, which no caller within [`crate::limits`] has.
    pub fn count(&mut self, value: usize) -> &mut Self {
        self.u32(u32::try_from(value).expect("lengths are within limits, far below 4 GiB"))
    }

    /// Bytes so far.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes written.
    #[must_use]
    pub fn into_vec(self) -> Vec<u8> {
        self.bytes
    }
}

/// Takes fixed-width little-endian values off the front of a slice; never reads beyond it and never allocates more than
/// the slice holds.
#[derive(Debug)]
pub struct Reader<'a> {
    what: &'static str,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Reads `bytes`; errors name `what`.
    #[must_use]
    pub fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { what, rest: bytes }
    }

    /// Bytes not yet read.
    #[must_use]
    pub fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// Takes `count` bytes.
    ///
    /// # Errors
    /// [`FormatError::Truncated`] where fewer are left.
    pub fn take(&mut self, count: usize) -> Result<&'a [u8], FormatError> {
        let (head, tail) = self.rest.split_at_checked(count).ok_or(FormatError::Truncated {
            what: self.what,
            needed: count as u64,
            found: self.rest.len() as u64,
        })?;
        self.rest = tail;
        Ok(head)
    }

    /// Takes an array.
    ///
    /// # Errors
    /// [`FormatError::Truncated`].
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    /// Takes a byte.
    ///
    /// # Errors
    /// [`FormatError::Truncated`].
    pub fn u8(&mut self) -> Result<u8, FormatError> {
        Ok(self.array::<1>()?[0])
    }

    /// Takes a `u16`.
    ///
    /// # Errors
    /// [`FormatError::Truncated`].
    pub fn u16(&mut self) -> Result<u16, FormatError> {
        self.array().map(u16::from_le_bytes)
    }

    /// Takes a `u32`.
    ///
    /// # Errors
    /// [`FormatError::Truncated`].
    pub fn u32(&mut self) -> Result<u32, FormatError> {
        self.array().map(u32::from_le_bytes)
    }

    /// Takes a `u64`.
    ///
    /// # Errors
    /// [`FormatError::Truncated`].
    pub fn u64(&mut self) -> Result<u64, FormatError> {
        self.array().map(u64::from_le_bytes)
    }

    /// Takes an `i64`.
    ///
    /// # Errors
    /// [`FormatError::Truncated`].
    pub fn i64(&mut self) -> Result<i64, FormatError> {
        self.array().map(i64::from_le_bytes)
    }

    /// Takes a `u32` length of at most `limit` and that many bytes.
    ///
    /// # Errors
    /// [`FormatError::OverLimit`], [`FormatError::Truncated`].
    pub fn block(&mut self, what: &'static str, limit: usize) -> Result<&'a [u8], FormatError> {
        let length = self.u32()? as usize;
        if length > limit {
            return Err(FormatError::OverLimit { what, found: length as u64, limit: limit as u64 });
        }
        self.take(length)
    }

    /// Takes a `u32` length and that many bytes of UTF-8.
    ///
    /// # Errors
    /// [`FormatError::OverLimit`], [`FormatError::Truncated`], [`FormatError::NotText`].
    pub fn text(&mut self, what: &'static str, limit: usize) -> Result<String, FormatError> {
        let bytes = self.block(what, limit)?;
        std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| FormatError::NotText { what })
    }

    /// Takes a `u32` count of elements of at least `element_bytes` bytes each, at most `limit`. The bytes for so many
    /// elements are known to be there, so a caller may reserve memory for them.
    ///
    /// # Errors
    /// [`FormatError::OverLimit`], [`FormatError::Truncated`].
    pub fn count(&mut self, what: &'static str, limit: usize, element_bytes: usize) -> Result<usize, FormatError> {
        let count = self.u32()? as usize;
        if count > limit {
            return Err(FormatError::OverLimit { what, found: count as u64, limit: limit as u64 });
        }
        let needed = count as u64 * element_bytes as u64;
        if needed > self.rest.len() as u64 {
            return Err(FormatError::Truncated { what, needed, found: self.rest.len() as u64 });
        }
        Ok(count)
    }

    /// Ends reading.
    ///
    /// # Errors
    /// [`FormatError::TrailingBytes`] where something is left.
    pub fn finish(self) -> Result<(), FormatError> {
        if self.rest.is_empty() {
            return Ok(());
        }
        Err(FormatError::TrailingBytes { what: self.what, extra: self.rest.len() as u64 })
    }
}
