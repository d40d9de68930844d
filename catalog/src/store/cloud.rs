//! The store in S3, Azure Blob Storage or Google Cloud Storage, through `object_store`.
//!
//! Endpoints, credentials and proxies come from the environment (`sign_in`); every request passes one gate (`http`) that
//! counts, paces and compares checksums, and failed ones are made again by one rule (`super::retry`).
//!
//! Bodies above [`PART_BYTES`] go up as multipart, parts in parallel, each part retried for itself. A multipart upload that
//! this process could not finish is aborted; one that a kill left behind is invisible to readers and costs space until the
//! bucket's own rule for incomplete uploads removes it.
//!
//! A conditional write whose reply was lost may have happened. Where a later attempt then finds the object changed, it is
//! read back: bodies that are written conditionally are unique (each has a nonce), so an equal body is our own.

mod http;
mod sign_in;

use std::future::Future;
use std::sync::Arc;

use bytes::Bytes;
use common::clock::UnixMillis;
use futures::stream::BoxStream;
use futures::{StreamExt as _, TryStreamExt as _};
use object_store::multipart::MultipartStore;
use object_store::path::Path;
use object_store::{
    Error, MultipartId, ObjectStore, ObjectStoreExt as _, PutMode, PutOptions, PutPayload, PutResult, UpdateVersion,
};

use super::retry::Retries;
use super::{CasOutcome, GET_BYTES_MAX, ObjectMeta, PutOutcome, StoreError, StoreOptions, Version, VersionKind, path};

/// Size of a multipart part: above every store's minimum (5 MiB), and small enough that a repeated part costs little.
const PART_BYTES: usize = 8 << 20;
/// Parts of one object under way at once.
const PARTS_IN_FLIGHT_MAX: usize = 4;
/// How much of a store's own words goes into an error.
const REASON_CHARS_MAX: usize = 400;

/// What `object_store`'s clients for clouds all do.
pub(super) trait Client: ObjectStore + MultipartStore {}

impl<T: ObjectStore + MultipartStore> Client for T {}

/// Whose cloud.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Amazon,
    Azure,
    Google,
}

impl Kind {
    /// What the names of its variables begin with.
    fn variables(self) -> &'static str {
        match self {
            Self::Amazon => "AWS_",
            Self::Azure => "AZURE_",
            Self::Google => "GOOGLE_",
        }
    }
}

/// A cloud store; clones share its connections.
#[derive(Debug, Clone)]
pub(super) struct CloudStore {
    client: Arc<dyn Client>,
    /// The URL, without a trailing slash.
    url: Arc<str>,
    /// Folder of the bucket that holds the store, or nothing.
    prefix: Arc<str>,
}

/// The end of an operation that may have been tried several times.
struct Tried<T> {
    result: Result<T, Error>,
    /// An attempt failed without telling whether it was carried out.
    ambiguous: bool,
}

impl CloudStore {
    pub(super) fn open(url: &str, parsed: &url::Url, options: StoreOptions) -> Result<Self, StoreError> {
        let bad = |why: String| StoreError::Url { url: url.into(), why };
        let name = parsed.host_str().filter(|name| !name.is_empty());
        let name = name.ok_or_else(|| bad("expected a bucket or container name after ://".into()))?;
        if parsed.query().is_some() || parsed.fragment().is_some() || parsed.port().is_some() {
            return Err(bad("expected bucket and prefix alone; endpoints come from the environment".into()));
        }
        if !parsed.username().is_empty() || parsed.password().is_some() {
            // The URL is not repeated: it holds the secret.
            let without = format!("{}://{name}{}", parsed.scheme(), parsed.path());
            return Err(StoreError::Url {
                url: without,
                why: "credentials belong into the environment, not into the URL".into(),
            });
        }
        let prefix = parsed.path().trim_matches('/');
        if !prefix.is_empty() {
            path::check(prefix).map_err(|error| bad(error.to_string()))?;
        }
        // The HTTP client takes the process's TLS provider; main has installed it already, a test may not have.
        common::net::tls::install_provider();
        let kind = match parsed.scheme() {
            "s3" => Kind::Amazon,
            "az" => Kind::Azure,
            _ => Kind::Google,
        };
        let client = sign_in::connect(url, kind, name, options)?;
        Ok(Self { client, url: url.trim_end_matches('/').into(), prefix: prefix.into() })
    }

    /// Where an object of the store lies in its bucket.
    fn at(&self, path: &str) -> Path {
        if self.prefix.is_empty() { Path::from(path) } else { Path::from(format!("{}/{path}", self.prefix)) }
    }

    /// Makes a request until it succeeds or there is no point in another attempt.
    async fn tried<T, F: Future<Output = Result<T, Error>>>(
        &self,
        op: &'static str,
        attempt: impl Fn() -> F,
    ) -> Tried<T> {
        let started = tokio::time::Instant::now();
        let mut retries = Retries::new();
        let mut ambiguous = false;
        loop {
            let error = match attempt().await {
                Ok(done) => return Tried { result: Ok(done), ambiguous },
                Err(error) => error,
            };
            ambiguous |= is_transient(&error);
            match again(op, &error, &mut retries, started) {
                Some(wait) => tokio::time::sleep(wait).await,
                None => return Tried { result: Err(error), ambiguous },
            }
        }
    }

    /// As [`Self::tried`], with errors as callers see them.
    async fn made<T, F: Future<Output = Result<T, Error>>>(
        &self,
        op: &'static str,
        path: &str,
        attempt: impl Fn() -> F,
    ) -> Result<T, StoreError> {
        self.tried(op, attempt).await.result.map_err(|error| self.failed(op, path, &error))
    }

    pub(super) async fn get_versioned(&self, path: &str) -> Result<(Bytes, Version), StoreError> {
        let at = self.at(path);
        let read = || async {
            let found = self.client.get(&at).await?;
            if found.meta.size > GET_BYTES_MAX {
                return Ok(Err(found.meta.size));
            }
            let version = UpdateVersion { e_tag: found.meta.e_tag.clone(), version: found.meta.version.clone() };
            Ok(Ok((found.bytes().await?, Version(VersionKind::Cloud(version)))))
        };
        let too_large = |found| StoreError::TooLarge { path: path.into(), found, max: GET_BYTES_MAX };
        self.made("read", path, read).await?.map_err(too_large)
    }

    pub(super) async fn get_range(&self, path: &str, range: std::ops::Range<u64>) -> Result<Bytes, StoreError> {
        let at = self.at(path);
        let tried = self.tried("read", || self.client.get_range(&at, range.clone())).await;
        let end = range.end;
        match tried.result {
            Ok(body) if body.len() as u64 == end - range.start => Ok(body),
            Ok(body) => {
                Err(StoreError::Truncated { path: path.into(), expected: end, found: range.start + body.len() as u64 })
            }
            // Stores answer a range beyond the end in different ways; the size tells.
            Err(error @ Error::Generic { .. }) if !Words::of(&error).may_pass() => match self.size(path).await {
                Ok(size) if size < end => Err(StoreError::Truncated { path: path.into(), expected: end, found: size }),
                _ => Err(self.failed("read", path, &error)),
            },
            Err(error) => Err(self.failed("read", path, &error)),
        }
    }

    pub(super) async fn size(&self, path: &str) -> Result<u64, StoreError> {
        let at = self.at(path);
        match self.tried("look up", || self.client.head(&at)).await.result {
            Ok(meta) => Ok(meta.size),
            // A reply to HEAD has no body that could say whether it is the object or the bucket that isn't there.
            Err(Error::NotFound { .. }) => {
                match self.tried("look up", || self.client.get_range(&at, 0..1)).await.result {
                    Err(error) => Err(self.failed("look up", path, &error)),
                    Ok(_) => Err(StoreError::NotFound { path: path.into() }),
                }
            }
            Err(error) => Err(self.failed("look up", path, &error)),
        }
    }

    pub(super) async fn put(&self, path: &str, parts: Vec<Bytes>) -> Result<(), StoreError> {
        let at = self.at(path);
        let size: usize = parts.iter().map(Bytes::len).sum();
        if size <= PART_BYTES {
            let payload = PutPayload::from_iter(parts);
            return self.made("write", path, || self.client.put(&at, payload.clone())).await.map(drop);
        }
        let id = self.made("write", path, || self.client.create_multipart(&at)).await?;
        let result = self.put_parts(path, &at, &id, parts).await;
        match result {
            Ok(()) => Ok(()),
            // The reply to the last request may be lost: then all of it is there, and nobody else uses this path.
            Err(_) if self.size(path).await.is_ok_and(|found| found == size as u64) => Ok(()),
            Err(error) => {
                // The upload's parts go; where that fails too, the bucket's rule for incomplete uploads takes them.
                let _ = self.client.abort_multipart(&at, &id).await;
                Err(error)
            }
        }
    }

    async fn put_parts(&self, path: &str, at: &Path, id: &MultipartId, parts: Vec<Bytes>) -> Result<(), StoreError> {
        let uploads = cut(parts, PART_BYTES).into_iter().enumerate().map(|(number, payload)| async move {
            self.made("write", path, || self.client.put_part(at, id, number, payload.clone())).await
        });
        let stored: Vec<_> = futures::stream::iter(uploads).buffered(PARTS_IN_FLIGHT_MAX).try_collect().await?;
        self.made("write", path, || self.client.complete_multipart(at, id, stored.clone())).await.map(drop)
    }

    pub(super) async fn put_if_absent(&self, path: &str, body: Bytes) -> Result<PutOutcome, StoreError> {
        let tried = self.put_with("create", path, &body, &PutMode::Create).await;
        match tried.result {
            Ok(_) => Ok(PutOutcome::Created),
            Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => {
                let ours = tried.ambiguous && self.get_versioned(path).await?.0 == body;
                Ok(if ours { PutOutcome::Created } else { PutOutcome::Exists })
            }
            Err(error) => Err(self.failed("create", path, &error)),
        }
    }

    pub(super) async fn compare_and_swap(
        &self,
        path: &str,
        version: UpdateVersion,
        body: Bytes,
    ) -> Result<CasOutcome, StoreError> {
        let tried = self.put_with("replace", path, &body, &PutMode::Update(version)).await;
        match tried.result {
            Ok(put) => Ok(CasOutcome::Swapped(Version(VersionKind::Cloud(UpdateVersion {
                e_tag: put.e_tag,
                version: put.version,
            })))),
            Err(error @ (Error::Precondition { .. } | Error::NotFound { .. })) => {
                if Words::of(&error).says_no_bucket() {
                    return Err(self.failed("replace", path, &error));
                }
                if !tried.ambiguous {
                    return Ok(CasOutcome::Changed);
                }
                match self.get_versioned(path).await {
                    Ok((found, version)) if found == body => Ok(CasOutcome::Swapped(version)),
                    Ok(_) | Err(StoreError::NotFound { .. }) => Ok(CasOutcome::Changed),
                    Err(error) => Err(error),
                }
            }
            Err(error) => Err(self.failed("replace", path, &error)),
        }
    }

    pub(super) fn list(&self, prefix: &str, after: Option<&str>) -> BoxStream<'static, Result<ObjectMeta, StoreError>> {
        let after = after.map(|after| self.at(after));
        let skip = if self.prefix.is_empty() { 0 } else { self.prefix.len() + 1 };
        let listing = Listing::begin(self.clone(), prefix, after.clone());
        let items = futures::stream::unfold(listing, |mut listing| async { Some((listing.next().await?, listing)) });
        items
            // A store that ignores where to begin lists more than was asked for.
            .filter(move |item| {
                let wanted =
                    |meta: &object_store::ObjectMeta| after.as_ref().is_none_or(|after| meta.location > *after);
                std::future::ready(item.as_ref().map_or(true, wanted))
            })
            .map(move |item| {
                item.map(|meta| ObjectMeta {
                    path: meta.location.as_ref().get(skip..).unwrap_or_default().to_owned(),
                    size: meta.size,
                    modified: UnixMillis(meta.last_modified.timestamp_millis()),
                })
            })
            .boxed()
    }

    pub(super) async fn delete(&self, path: &str) -> Result<(), StoreError> {
        let at = self.at(path);
        match self.tried("delete", || self.client.delete(&at)).await.result {
            Ok(()) => Ok(()),
            Err(error) => match self.failed("delete", path, &error) {
                StoreError::NotFound { .. } => Ok(()),
                error => Err(error),
            },
        }
    }

    async fn put_with(&self, op: &'static str, path: &str, body: &Bytes, mode: &PutMode) -> Tried<PutResult> {
        let at = self.at(path);
        self.tried(op, || {
            let options = PutOptions { mode: mode.clone(), ..PutOptions::default() };
            self.client.put_opts(&at, body.clone().into(), options)
        })
        .await
    }

    fn failed(&self, op: &'static str, path: &str, error: &Error) -> StoreError {
        let words = Words::of(error);
        let path = path.to_owned();
        if words.says_no_bucket() {
            return StoreError::NoBucket { op, path, url: self.url.to_string() };
        }
        match error {
            Error::NotFound { .. } => StoreError::NotFound { path },
            Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => {
                StoreError::Denied { op, path, reason: words.reason() }
            }
            _ if words.says_denied() => StoreError::Denied { op, path, reason: words.reason() },
            Error::NotSupported { .. } | Error::NotImplemented { .. } => {
                StoreError::NotConditional { what: "the operations that Blockferry needs" }
            }
            _ => StoreError::Unavailable { op, path, reason: words.reason() },
        }
    }
}

/// A listing that goes on behind its last object where a request of it failed. Clouds list in the order of names.
struct Listing {
    store: CloudStore,
    folder: String,
    items: Option<BoxStream<'static, Result<object_store::ObjectMeta, Error>>>,
    last: Option<Path>,
    retries: Retries,
    since: tokio::time::Instant,
}

impl Listing {
    fn begin(store: CloudStore, folder: &str, after: Option<Path>) -> Self {
        let since = tokio::time::Instant::now();
        let mut listing =
            Self { store, folder: folder.to_owned(), items: None, last: after, retries: Retries::new(), since };
        listing.items = Some(listing.request());
        listing
    }

    /// What lies behind the last object.
    fn request(&self) -> BoxStream<'static, Result<object_store::ObjectMeta, Error>> {
        let at = self.store.at(&self.folder);
        match &self.last {
            None => self.store.client.list(Some(&at)),
            Some(last) => self.store.client.list_with_offset(Some(&at), last),
        }
    }

    async fn next(&mut self) -> Option<Result<object_store::ObjectMeta, StoreError>> {
        loop {
            let error = match self.items.as_mut()?.next().await? {
                Ok(meta) => {
                    self.last = Some(meta.location.clone());
                    self.retries = Retries::new();
                    self.since = tokio::time::Instant::now();
                    return Some(Ok(meta));
                }
                Err(error) => error,
            };
            let Some(wait) = again("list", &error, &mut self.retries, self.since) else {
                self.items = None;
                return Some(Err(self.store.failed("list", &self.folder, &error)));
            };
            tokio::time::sleep(wait).await;
            self.items = Some(self.request());
        }
    }
}

/// True where the same request may work later.
fn is_transient(error: &Error) -> bool {
    let words = Words::of(error);
    matches!(error, Error::Generic { .. }) && words.may_pass() || words.says_conflict()
}

/// How long to wait before a request that failed is made again, or `None` where it is not.
fn again(
    op: &'static str,
    error: &Error,
    retries: &mut Retries,
    since: tokio::time::Instant,
) -> Option<std::time::Duration> {
    let random = common::rng::random().map_or(u64::MAX, u64::from_le_bytes);
    let wait = retries.after(is_transient(error), since.elapsed(), random)?;
    metrics::counter!("blockferry_store_retries_total").increment(1);
    let reason = Words::of(error).reason();
    tracing::debug!(op, retry = retries.made(), ?wait, reason, "a request to the store failed");
    Some(wait)
}

/// Payloads of exactly `size` bytes (the last one shorter) that share the memory of `parts`.
fn cut(parts: Vec<Bytes>, size: usize) -> Vec<PutPayload> {
    let mut payloads = Vec::new();
    let (mut open, mut len) = (Vec::new(), 0);
    for mut part in parts {
        while !part.is_empty() {
            let piece = part.split_to(part.len().min(size - len));
            len += piece.len();
            open.push(piece);
            if len == size {
                payloads.push(PutPayload::from_iter(std::mem::take(&mut open)));
                len = 0;
            }
        }
    }
    if !open.is_empty() {
        payloads.push(PutPayload::from_iter(open));
    }
    payloads
}

/// What an error of the client library, and the store's reply in it, say.
struct Words(String);

impl Words {
    fn of(error: &Error) -> Self {
        let mut text = error.to_string();
        let mut source = std::error::Error::source(error);
        // The first cause is often only in the chain.
        while let Some(cause) = source {
            let cause_text = cause.to_string();
            if !text.contains(&cause_text) {
                text = format!("{text}: {cause_text}");
            }
            source = cause.source();
        }
        Self(text)
    }

    /// Of the store's reply, the content of `<name>`.
    fn tag(&self, name: &str) -> Option<&str> {
        let start = self.0.find(&format!("<{name}>"))? + name.len() + 2;
        let len = self.0[start..].find(&format!("</{name}>"))?;
        Some(&self.0[start..start + len])
    }

    fn says_no_bucket(&self) -> bool {
        matches!(
            self.tag("Code"),
            Some("NoSuchBucket" | "ContainerNotFound" | "ContainerBeingDeleted" | "ResourceNotFound")
        )
    }

    /// Credentials that ran out are a plain bad request on some stores.
    fn says_denied(&self) -> bool {
        matches!(self.status(), Some(401 | 403))
            || matches!(
                self.tag("Code"),
                Some(
                    "ExpiredToken"
                        | "InvalidToken"
                        | "TokenRefreshRequired"
                        | "InvalidAccessKeyId"
                        | "SignatureDoesNotMatch"
                        | "AuthenticationFailed"
                        | "AuthorizationHeaderMalformed"
                )
            )
    }

    /// Another conditional write of the same object was under way; which of them won is not said.
    fn says_conflict(&self) -> bool {
        matches!(self.tag("Code"), Some("ConditionalRequestConflict" | "OperationAborted"))
    }

    /// The body did not arrive whole, or not as it was sent.
    fn says_damaged(&self) -> bool {
        let codes = [
            "RequestTimeout",
            "IncompleteBody",
            "BadDigest",
            "XAmzContentSHA256Mismatch",
            "Md5Mismatch",
            "Crc64Mismatch",
        ];
        self.tag("Code").is_some_and(|code| codes.contains(&code))
    }

    /// True where the same request may work later: no reply came, or one that says so.
    fn may_pass(&self) -> bool {
        match self.status() {
            None => true,
            Some(status) => status >= 500 || matches!(status, 408 | 429) || status < 300 || self.says_damaged(),
        }
    }

    /// The reply's HTTP status, where there was a reply.
    fn status(&self) -> Option<u16> {
        let at = self.0.find("status code: ")? + "status code: ".len();
        self.0.get(at..at + 3)?.parse().ok()
    }

    /// For people: of bounded length, on one line, and without what a reply repeats of the request.
    fn reason(&self) -> String {
        let text = match (self.status(), self.tag("Code")) {
            (status, Some(code)) => {
                let status = status.map(|status| format!("status {status}, ")).unwrap_or_default();
                let message = self.tag("Message").map(|message| format!(": {message}")).unwrap_or_default();
                format!("{status}{code}{message}")
            }
            (Some(status), None) => format!("status {status}"),
            (None, None) => self.0.clone(),
        };
        text.chars().take(REASON_CHARS_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Words {
        Words(text.to_owned())
    }

    #[test]
    fn what_a_reply_repeats_of_the_request_is_not_repeated() {
        let denied = words(
            "Error performing GET http://h/b/x in 1ms - Server returned non-2xx status code: 403 Forbidden: <Error><Code>SignatureDoesNotMatch</Code>\
             <Message>they differ</Message><AWSAccessKeyId>AKIA</AWSAccessKeyId><StringToSign>hush</StringToSign></Error>",
        );
        assert_eq!(denied.reason(), "status 403, SignatureDoesNotMatch: they differ");
        assert!(denied.says_denied() && !denied.may_pass());
    }

    #[test]
    fn which_replies_are_worth_another_attempt() {
        for (text, may_pass) in [
            ("HTTP error: connection refused", true),
            ("non-2xx status code: 503 Service Unavailable: ", true),
            ("non-2xx status code: 429 Too Many Requests: ", true),
            ("non-2xx status code: 400 Bad Request: <Code>RequestTimeout</Code>", true),
            ("non-2xx status code: 400 Bad Request: <Code>XAmzContentSHA256Mismatch</Code>", true),
            ("non-2xx status code: 400 Bad Request: <Code>ExpiredToken</Code>", false),
            ("non-2xx status code: 416 Range Not Satisfiable: ", false),
        ] {
            assert_eq!(words(text).may_pass(), may_pass, "{text}");
        }
    }

    #[test]
    fn multipart_pieces_are_equal_but_the_last_and_hold_all_bytes_in_order() {
        let parts = vec![Bytes::from(vec![1; 7]), Bytes::new(), Bytes::from(vec![2; 20]), Bytes::from(vec![3; 3])];
        let whole = parts.concat();
        let cut = cut(parts, 8);
        assert_eq!(cut.iter().map(PutPayload::content_length).collect::<Vec<_>>(), vec![8, 8, 8, 6]);
        assert_eq!(cut.iter().flat_map(|piece| piece.iter().flatten().copied()).collect::<Vec<_>>(), whole);
    }
}
