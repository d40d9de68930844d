//! Every request that really goes to a cloud passes here: it waits for its turn, is counted, and what arrived is compared
//! with what was sent.
//!
//! # Checksums
//!
//! S3 refuses a body whose SHA-256 is not the signed one. Azure and GCS say in their reply which checksum they computed over
//! what they received (CRC-64 or MD5, CRC-32C), and a reply that says another than ours is a failed request. To GCS the
//! checksum is also sent along, so that a damaged body is not stored at all.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http_body_util::BodyExt as _;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpRequestBody, HttpResponse, HttpService,
    ReqwestConnector,
};
use object_store::{ClientOptions, HeaderMap, HeaderValue};
use tokio::time::Instant;

use super::super::pace::Pace;
use super::Kind;

const GCS_HASH: &str = "x-goog-hash";
const AZURE_CRC64: &str = "x-ms-content-crc64";
const CONTENT_MD5: &str = "content-md5";

/// What all connections of one store share.
#[derive(Debug)]
struct Gate {
    kind: Kind,
    pace: Mutex<Pace>,
    opened: Instant,
}

/// Makes clients that pass their requests through one gate.
#[derive(Debug, Clone)]
pub(super) struct Connector(Arc<Gate>);

impl Connector {
    /// For a store of this kind, with at most so many requests a second.
    pub(super) fn new(kind: Kind, per_second: Option<u32>) -> Self {
        Self(Arc::new(Gate { kind, pace: Mutex::new(Pace::new(per_second)), opened: Instant::now() }))
    }
}

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let inner = ReqwestConnector::default().connect(options)?;
        Ok(HttpClient::new(Gated { gate: Arc::clone(&self.0), inner }))
    }
}

#[derive(Debug)]
struct Gated {
    gate: Arc<Gate>,
    inner: HttpClient,
}

#[async_trait::async_trait]
impl HttpService for Gated {
    async fn call(&self, mut request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let wait = self.gate.pace(|pace, now| pace.next(now));
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
        let op = operation(request.method().as_str(), request.uri().path(), request.uri().query().unwrap_or_default());
        let sent = request.body().content_length() as u64;
        metrics::counter!("blockferry_store_requests_total", "op" => op).increment(1);
        metrics::counter!("blockferry_store_sent_bytes_total").increment(sent);
        let expected =
            if matches!(op, "put" | "part") { Sums::of(self.gate.kind, op, request.body()).await } else { None };
        if let Some(Sums::Crc32c(sum)) = expected
            && let Ok(value) = HeaderValue::from_str(&format!("crc32c={}", base64(&sum.to_be_bytes())))
        {
            request.headers_mut().insert(GCS_HASH, value);
        }
        let response = match self.inner.execute(request).await {
            Ok(response) => response,
            Err(error) => {
                failed("connection");
                return Err(error);
            }
        };
        let status = response.status().as_u16();
        match status {
            429 | 503 => {
                failed("throttled");
                if let Some(asked) = retry_after(response.headers()) {
                    self.gate.pace(|pace, now| pace.pause(now, asked));
                }
            }
            500.. => failed("server"),
            401 | 403 => failed("denied"),
            _ => {}
        }
        let length = response.headers().get("content-length").and_then(|value| value.to_str().ok()?.parse().ok());
        if let Some(length) = length.filter(|_| matches!(op, "get" | "list")) {
            metrics::counter!("blockferry_store_received_bytes_total").increment(length);
        }
        if let Some(expected) = expected.filter(|_| (200..300).contains(&status)) {
            expected.compare(response.headers()).inspect_err(|_| failed("checksum"))?;
        }
        Ok(response)
    }
}

impl Gate {
    fn pace<T>(&self, act: impl FnOnce(&mut Pace, Duration) -> T) -> T {
        let mut pace = self.pace.lock().unwrap_or_else(PoisonError::into_inner);
        act(&mut pace, self.opened.elapsed())
    }
}

fn failed(kind: &'static str) {
    metrics::counter!("blockferry_store_failures_total", "kind" => kind).increment(1);
}

/// What a request is, in the words of the clouds' price lists.
fn operation(method: &str, path: &str, query: &str) -> &'static str {
    let has = |name: &str| query.split('&').any(|pair| pair.split('=').next() == Some(name));
    let block = |name: &str| query.split('&').any(|pair| pair.strip_prefix("comp=") == Some(name));
    match method {
        "PUT" if has("partNumber") || block("block") => "part",
        "PUT" if block("blocklist") => "multipart",
        "PUT" => "put",
        "POST" if has("delete") || block("batch") => "delete",
        "POST" if has("uploads") || has("uploadId") => "multipart",
        "GET" if has("list-type") || block("list") => "list",
        "GET" if path.contains("/computeMetadata/") || path.contains("/meta-data/") || path.contains("/metadata/") => {
            "credentials"
        }
        "GET" => "get",
        "HEAD" => "head",
        "DELETE" => "delete",
        // Signing in; nothing else is posted.
        _ => "credentials",
    }
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    headers.get("retry-after")?.to_str().ok()?.trim().parse().ok().map(Duration::from_secs)
}

/// What a store is expected to say of a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sums {
    Crc32c(u32),
    Crc64(u64),
    Md5([u8; 16]),
}

#[derive(Debug, thiserror::Error)]
#[error("the store received other bytes than were sent: expected {header} {expected}, found {found}")]
struct Damaged {
    header: &'static str,
    expected: String,
    found: String,
}

impl Sums {
    async fn of(kind: Kind, op: &str, body: &HttpRequestBody) -> Option<Self> {
        let mut rest = body.clone();
        let (mut crc32c, mut crc64, mut md5) =
            (0, crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc64Nvme), md5::Md5::default());
        while let Some(Ok(frame)) = rest.frame().await {
            let Ok(bytes) = frame.into_data() else { continue };
            match (kind, op) {
                (Kind::Google, _) => crc32c = ::crc32c::crc32c_append(crc32c, &bytes),
                (Kind::Azure, "part") => crc64.update(&bytes),
                (Kind::Azure, _) => md5::Digest::update(&mut md5, &bytes),
                (Kind::Amazon, _) => return None,
            }
        }
        Some(match (kind, op) {
            (Kind::Google, _) => Self::Crc32c(crc32c),
            (Kind::Azure, "part") => Self::Crc64(crc64.finalize()),
            (Kind::Azure, _) => Self::Md5(md5::Digest::finalize(md5).into()),
            (Kind::Amazon, _) => return None,
        })
    }

    /// A reply without a checksum says nothing.
    fn compare(self, headers: &HeaderMap) -> Result<(), HttpError> {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let (header, expected, found) = match self {
            Self::Crc32c(sum) => {
                let all = headers.get_all(GCS_HASH).into_iter().filter_map(|value| value.to_str().ok());
                let found = all.flat_map(|value| value.split(',')).find_map(|one| one.trim().strip_prefix("crc32c="));
                (GCS_HASH, base64(&sum.to_be_bytes()), found)
            }
            // Azure writes the number's bytes in little-endian order.
            Self::Crc64(sum) => (AZURE_CRC64, base64(&sum.to_le_bytes()), text(AZURE_CRC64)),
            Self::Md5(sum) => (CONTENT_MD5, base64(&sum), text(CONTENT_MD5)),
        };
        match found {
            Some(found) if found != expected => {
                let damaged = Damaged { header, expected, found: found.to_owned() };
                Err(HttpError::new(HttpErrorKind::Interrupted, damaged))
            }
            _ => Ok(()),
        }
    }
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let group = chunk.iter().fold(0_u32, |group, byte| group << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for digit in 0..4 {
            let value = (group >> (18 - 6 * digit) & 63) as usize;
            text.push(if digit <= chunk.len() { char::from(DIGITS[value]) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_named_as_price_lists_name_them() {
        for (method, query, op) in [
            ("PUT", "", "put"),
            ("PUT", "partNumber=1&uploadId=x", "part"),
            ("POST", "uploads=", "multipart"),
            ("POST", "uploadId=x", "multipart"),
            ("PUT", "comp=block&blockid=x", "part"),
            ("PUT", "comp=blocklist", "multipart"),
            ("GET", "", "get"),
            ("GET", "list-type=2&prefix=v1", "list"),
            ("GET", "restype=container&comp=list", "list"),
            ("HEAD", "", "head"),
            ("DELETE", "", "delete"),
            ("POST", "delete", "delete"),
            ("POST", "restype=container&comp=batch", "delete"),
            ("POST", "", "credentials"),
        ] {
            assert_eq!(operation(method, "/b/v1/x", query), op, "{method} {query}");
        }
    }

    #[tokio::test]
    async fn a_reply_with_another_checksum_is_a_failed_request_and_one_without_is_not() {
        let body = HttpRequestBody::from(b"123456789".to_vec());
        // The check values that the algorithms' catalogues give for these nine bytes.
        let google = Sums::of(Kind::Google, "put", &body).await.expect("a sum");
        assert_eq!(google, Sums::Crc32c(0xe306_9283));
        let azure = Sums::of(Kind::Azure, "part", &body).await.expect("a sum");
        assert_eq!(azure, Sums::Crc64(0xae8b_1486_0a79_9888));
        let md5 = Sums::of(Kind::Azure, "put", &body).await.expect("a sum");
        for (sum, header, good, bad) in [
            (google, GCS_HASH, "crc32c=4waSgw==, md5=x", "crc32c=4waSgg=="),
            (md5, CONTENT_MD5, "JfnnlDI7RTiF9RgfG2JNCw==", "AAAAAAAAAAAAAAAAAAAAAA=="),
        ] {
            let reply = |value: &str| {
                let mut headers = HeaderMap::new();
                headers.insert(header, HeaderValue::from_str(value).expect("ASCII"));
                headers
            };
            assert!(sum.compare(&reply(good)).is_ok(), "{header}");
            assert!(sum.compare(&reply(bad)).is_err(), "{header}");
            assert!(sum.compare(&HeaderMap::new()).is_ok());
        }
    }

    #[test]
    fn base64_is_that_of_the_standard() {
        for (bytes, text) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }
}
