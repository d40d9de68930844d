//! A fake of Google Cloud Storage: the calls of its XML API that Blockferry's client makes, with generations as preconditions and
//! checksums in replies. **It is our own reading of the documentation; nothing here was ever tried on the real service.**
//!
//! Told to, it ignores preconditions, as some servers do: then the start-up probe must refuse it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufReader, Read};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, PoisonError};

use super::StoreAt;
use super::http::{Answer, Head, Listener, base64, decoded, read_head};

/// The bucket.
pub const BUCKET: &str = "blockferry";
const TOKEN: &str = "token-of-the-tests-0123456789";
const DATE: &str = "Tue, 24 Nov 2026 10:00:00 GMT";
/// Objects in one page of a listing.
const PAGE: usize = 7;

#[derive(Debug, Clone)]
struct Object {
    body: Vec<u8>,
    generation: u64,
}

#[derive(Debug, Default)]
struct Bucket {
    objects: BTreeMap<String, Object>,
    uploads: BTreeMap<String, BTreeMap<usize, Vec<u8>>>,
    generation: u64,
    ignores_preconditions: bool,
}

/// The fake, in memory.
#[derive(Debug)]
pub struct GcsFake {
    listener: Listener,
}

impl GcsFake {
    /// An empty bucket.
    #[must_use]
    pub fn start() -> Self {
        Self::listen(false)
    }

    /// An empty bucket of a server that takes every write.
    #[must_use]
    pub fn start_ignoring_preconditions() -> Self {
        Self::listen(true)
    }

    fn listen(ignores_preconditions: bool) -> Self {
        let bucket = Arc::new(Mutex::new(Bucket { ignores_preconditions, ..Bucket::default() }));
        Self { listener: Listener::start(move |stream| serve(stream, &bucket)) }
    }

    /// `HOST:PORT`.
    #[must_use]
    pub fn address(&self) -> &str {
        self.listener.address()
    }

    /// Its bucket as a store.
    #[must_use]
    pub fn store(&self) -> StoreAt {
        StoreAt::new(
            &format!("gs://{BUCKET}"),
            &[
                ("GOOGLE_BASE_URL", &format!("http://{}", self.address())),
                ("GOOGLE_ALLOW_HTTP", "true"),
                ("GOOGLE_BEARER_TOKEN", TOKEN),
            ],
        )
    }

    /// What nobody may ever print.
    #[must_use]
    pub fn secret(&self) -> &'static str {
        TOKEN
    }
}

fn serve(stream: TcpStream, bucket: &Mutex<Bucket>) {
    let Ok(mut writer) = stream.try_clone() else { return };
    let mut reader = BufReader::new(stream);
    while let Ok(Some(head)) = read_head(&mut reader) {
        let mut body = vec![0; head.content_length()];
        if reader.read_exact(&mut body).is_err() {
            return;
        }
        let answer = bucket.lock().unwrap_or_else(PoisonError::into_inner).answer(&head, body);
        if answer.write(&mut writer, &head.method, false).is_err() {
            return;
        }
    }
}

fn error(status: u16, code: &str) -> Answer {
    Answer::new(status, format!("<Error><Code>{code}</Code><Message>said the fake</Message></Error>"))
}

fn hash(body: &[u8]) -> String {
    format!("crc32c={}", base64(&crc32c::crc32c(body).to_be_bytes()))
}

impl Bucket {
    fn answer(&mut self, head: &Head, body: Vec<u8>) -> Answer {
        if head.header("authorization") != Some(&format!("Bearer {TOKEN}")) {
            return error(401, "AuthenticationRequired");
        }
        let path = decoded(head.path());
        let Some((bucket, key)) =
            path.trim_start_matches('/').split_once('/').or(Some((path.trim_start_matches('/'), "")))
        else {
            return error(400, "InvalidURI");
        };
        if bucket != BUCKET {
            return error(404, "NoSuchBucket");
        }
        let upload = head.query("uploadId");
        match (head.method.as_str(), upload) {
            ("GET", None) if key.is_empty() => self.list(head),
            ("GET" | "HEAD", None) => self.read(head, key),
            ("PUT", None) => self.put(head, key, body),
            ("DELETE", None) => match self.objects.remove(key) {
                Some(_) => Answer::new(204, ""),
                None => error(404, "NoSuchKey"),
            },
            ("POST", None) if head.query("uploads").is_some() => {
                self.generation += 1;
                let id = format!("upload-{}", self.generation);
                self.uploads.insert(id.clone(), BTreeMap::new());
                Answer::new(
                    200,
                    format!(
                        "<InitiateMultipartUploadResult><Bucket>{BUCKET}</Bucket><Key>{key}</Key><UploadId>{id}</UploadId>\
                         </InitiateMultipartUploadResult>"
                    ),
                )
            }
            ("PUT", Some(id)) => {
                let number = head.query("partNumber").and_then(|text| text.parse().ok());
                let (Some(parts), Some(number)) = (self.uploads.get_mut(&id), number) else {
                    return error(404, "NoSuchUpload");
                };
                if head.header("x-goog-hash").is_some_and(|sent| sent != hash(&body)) {
                    return error(400, "BadDigest");
                }
                let answer =
                    Answer::new(200, "").with("etag", format!("\"part-{number}\"")).with("x-goog-hash", hash(&body));
                parts.insert(number, body);
                answer
            }
            ("POST", Some(id)) => match self.uploads.remove(&id) {
                Some(parts) => {
                    let object = self.store(key, parts.into_values().flatten().collect());
                    Answer::new(
                        200,
                        format!(
                            "<CompleteMultipartUploadResult><Bucket>{BUCKET}</Bucket><Key>{key}</Key><ETag>\"{0}\"</ETag>\
                             </CompleteMultipartUploadResult>",
                            object.generation
                        ),
                    )
                    .with("x-goog-generation", object.generation.to_string())
                }
                None => error(404, "NoSuchUpload"),
            },
            ("DELETE", Some(id)) => match self.uploads.remove(&id) {
                Some(_) => Answer::new(204, ""),
                None => error(404, "NoSuchUpload"),
            },
            _ => error(405, "MethodNotAllowed"),
        }
    }

    fn store(&mut self, key: &str, body: Vec<u8>) -> Object {
        self.generation += 1;
        let object = Object { body, generation: self.generation };
        self.objects.insert(key.to_owned(), object.clone());
        object
    }

    fn put(&mut self, head: &Head, key: &str, body: Vec<u8>) -> Answer {
        let present = self.objects.get(key).map_or(0, |object| object.generation);
        let wanted = head.header("x-goog-if-generation-match").and_then(|text| text.parse::<u64>().ok());
        if wanted.is_some_and(|wanted| wanted != present) && !self.ignores_preconditions {
            return error(412, "PreconditionFailed");
        }
        if head.header("x-goog-hash").is_some_and(|sent| sent != hash(&body)) {
            return error(400, "BadDigest");
        }
        let hash = hash(&body);
        let object = self.store(key, body);
        Answer::new(200, "")
            .with("etag", format!("\"{}\"", object.generation))
            .with("x-goog-generation", object.generation.to_string())
            .with("x-goog-hash", hash)
    }

    fn read(&self, head: &Head, key: &str) -> Answer {
        let Some(object) = self.objects.get(key) else { return error(404, "NoSuchKey") };
        let len = object.body.len();
        let described = |answer: Answer| {
            answer
                .with("etag", format!("\"{}\"", object.generation))
                .with("x-goog-generation", object.generation.to_string())
                .with("last-modified", DATE)
        };
        let range = head.header("range").and_then(|text| {
            let (start, end) = text.strip_prefix("bytes=")?.split_once('-')?;
            Some((start.parse::<usize>().ok()?, end.parse::<usize>().ok()?))
        });
        match range {
            None if head.method == "HEAD" => described(Answer::new(200, "").with("content-length", len.to_string())),
            None => described(Answer::new(200, object.body.clone())),
            Some((start, _)) if start >= len => error(416, "InvalidRange"),
            Some((start, end)) => {
                let end = end.min(len - 1);
                described(Answer::new(206, &object.body[start..=end]))
                    .with("content-range", format!("bytes {start}-{end}/{len}"))
            }
        }
    }

    fn list(&self, head: &Head) -> Answer {
        let prefix = head.query("prefix").unwrap_or_default();
        let after = head.query("continuation-token").or_else(|| head.query("start-after")).unwrap_or_default();
        let mut found = self.objects.iter().filter(|(key, _)| key.starts_with(&prefix) && **key > after);
        let page: Vec<_> = found.by_ref().take(PAGE).collect();
        let more = found.next().is_some();
        let mut text = format!("<ListBucketResult><Name>{BUCKET}</Name><IsTruncated>{more}</IsTruncated>");
        for (key, object) in &page {
            let _ = write!(
                text,
                "<Contents><Key>{key}</Key><Generation>{0}</Generation><ETag>\"{0}\"</ETag><Size>{1}</Size>\
                 <LastModified>2026-11-24T10:00:00.000Z</LastModified></Contents>",
                object.generation,
                object.body.len()
            );
        }
        if let Some((last, _)) = page.last().filter(|_| more) {
            let _ = write!(text, "<NextContinuationToken>{last}</NextContinuationToken>");
        }
        Answer::new(200, text + "</ListBucketResult>")
    }
}
