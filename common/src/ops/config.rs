//! Reading a TOML configuration file: an unknown key is an error, a missing default file is not.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

/// Why a configuration file can't be used. Exit code 2.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file can't be read.
    #[error("cannot read the configuration {}: {source}; check --config", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The file's content is wrong.
    #[error("configuration {}: {problem}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What and where.
        problem: String,
    },
}

/// Reads `chosen`; without it `default`, and if there is no such file all values stay unset.
///
/// # Errors
/// [`FileError`].
pub fn load<T: DeserializeOwned + Default>(chosen: Option<&Path>, default: &Path) -> Result<T, FileError> {
    let path = chosen.unwrap_or(default);
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if chosen.is_none() && error.kind() == std::io::ErrorKind::NotFound => return Ok(T::default()),
        Err(source) => return Err(FileError::Unreadable { path: path.into(), source }),
    };
    toml::from_str(&text)
        .map_err(|error| FileError::Malformed { path: path.into(), problem: error.to_string().trim().to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default, PartialEq, Eq, serde::Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Values {
        name: Option<String>,
    }

    #[test]
    fn the_default_file_may_be_missing_and_a_chosen_one_may_not() {
        let dir = tempfile::tempdir().expect("a folder");
        let missing = dir.path().join("none.toml");
        assert_eq!(load::<Values>(None, &missing).expect("it may be missing"), Values::default());
        let error = load::<Values>(Some(&missing), &missing).expect_err("it was asked for").to_string();
        assert!(error.contains("none.toml") && error.contains("--config"), "{error}");
    }

    #[test]
    fn an_unknown_key_is_named_with_its_file() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("x.toml");
        std::fs::write(&path, "name = \"a\"\n").expect("writable");
        assert_eq!(load::<Values>(Some(&path), &path).expect("valid").name.as_deref(), Some("a"));
        std::fs::write(&path, "nmae = 1\n").expect("writable");
        let error = load::<Values>(None, &path).expect_err("unknown").to_string();
        assert!(error.contains("x.toml") && error.contains("nmae"), "{error}");
    }
}
