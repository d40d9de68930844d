//! Which object paths are taken. PURE.
//!
//! A path is one or more components joined by `/`, each of `[A-Za-z0-9._-]`, none starting with a dot. So no path leaves
//! the store's directory, meets the local store's own files (all in folders with a leading dot), or reads differently on
//! one store than on another.

use common::limits::STORE_PATH_BYTES_MAX;

use super::StoreError;

/// Longest component: what file systems take.
const COMPONENT_BYTES_MAX: usize = 255;

/// Checks a path or a listing's prefix.
pub(super) fn check(path: &str) -> Result<(), StoreError> {
    let bad = |why| Err(StoreError::Path { path: path.chars().take(STORE_PATH_BYTES_MAX).collect(), why });
    if path.is_empty() {
        return bad("it is empty");
    }
    if path.len() > STORE_PATH_BYTES_MAX {
        return bad("it is longer than 512 bytes");
    }
    for component in path.split('/') {
        if component.is_empty() {
            return bad("it has an empty component");
        }
        if component.len() > COMPONENT_BYTES_MAX {
            return bad("it has a component longer than 255 bytes");
        }
        if component.starts_with('.') {
            return bad("it has a component with a leading dot");
        }
        if !component.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-')) {
            return bad("it has a character other than letters, digits, '.', '_' and '-'");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_could_leave_the_store_are_refused() {
        for path in ["", "/etc/passwd", "..", "a/../b", "a//b", "a/", ".tmp/x", "a/.b", "a\\b", "a\0b", "ä", "a b"] {
            assert!(check(path).is_err(), "{path:?}");
        }
        assert!(check(&"a/".repeat(300)).is_err());
        assert!(check("v1/volumes/0190-ab/log/00000001").is_ok());
    }
}
