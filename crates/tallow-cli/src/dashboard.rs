//! The live page of a run, or of runs that are compared, on this machine only.
//! Invariant: it listens on loopback, answers only those who call it by a loopback name (so that no web page can
//! read it through a name of its own), and gives nothing but the page and its data.
//! Absent on purpose: control. A run is watched here, not steered.
use anyhow::{Context as _, Result};
use axum::{
    Router,
    extract::{Request, State},
    http::{HeaderMap, StatusCode, header},
    middleware::{self, Next},
    response::{Html, IntoResponse, Response},
    routing::get,
};
use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    sync::{Arc, Mutex, PoisonError},
};
use tallow::train::watch::{self, Record};

/// What the page shows, shared with the run.
pub(crate) type Shared = Arc<Mutex<Record>>;

/// What is served.
#[derive(Clone)]
pub(crate) enum Page {
    /// A run.
    Run(Shared),
    /// Runs side by side, by name.
    Sweep {
        /// Over the page.
        title: String,
        /// In the order of the table.
        runs: Vec<(String, Shared)>,
    },
}

impl Page {
    pub(crate) fn html(&self, live: bool) -> String {
        match self {
            Page::Run(record) => watch::html(&copy(record), live),
            Page::Sweep { title, runs } => watch::compare_html(title, &copies(runs), live),
        }
    }
    fn data(&self) -> String {
        match self {
            Page::Run(record) => watch::data(&copy(record)).to_string(),
            Page::Sweep { title, runs } => watch::compare_data(title, &copies(runs)).to_string(),
        }
    }
}

/// Serves the page until the program ends; returns its address. Port 0 takes a free one.
pub(crate) fn serve(page: Page, port: u16) -> Result<SocketAddr> {
    let wanted = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let listener = TcpListener::bind(wanted).with_context(|| {
        format!("dashboard: cannot listen on {wanted}; choose another port, or 0 for a free one")
    })?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()?;
    let app = router(page);
    std::thread::Builder::new()
        .name("dashboard".to_owned())
        .spawn(move || {
            let served = runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener)?;
                axum::serve(listener, app).await
            });
            if let Err(e) = served {
                tracing::warn!("dashboard: it ended ({e}); the run goes on");
            }
        })?;
    Ok(address)
}

fn router(page: Page) -> Router {
    Router::new()
        .route("/", get(html))
        .route("/run.json", get(data))
        .layer(middleware::from_fn(only_loopback))
        .with_state(page)
}

fn copy(record: &Shared) -> Record {
    record
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone()
}

fn copies(runs: &[(String, Shared)]) -> Vec<(String, Record)> {
    let one = |(name, record): &(String, Shared)| (name.clone(), copy(record));
    runs.iter().map(one).collect()
}

async fn html(State(page): State<Page>) -> impl IntoResponse {
    Html(page.html(true))
}

async fn data(State(page): State<Page>) -> impl IntoResponse {
    let kind = [
        (header::CONTENT_TYPE, "application/json"),
        (header::CACHE_CONTROL, "no-store"),
    ];
    (kind, page.data())
}

async fn only_loopback(headers: HeaderMap, request: Request, next: Next) -> Response {
    let host = headers.get(header::HOST).and_then(|h| h.to_str().ok());
    match host.is_some_and(is_loopback) {
        true => next.run(request).await,
        false => StatusCode::FORBIDDEN.into_response(),
    }
}

/// Is `host`, maybe with a port, a name that only this machine answers to?
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(v6) => v6.split(']').next(),
        None => host.split(':').next(),
    };
    matches!(name, Some("localhost" | "127.0.0.1" | "::1"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};

    fn ask(address: SocketAddr, path: &str, host: &str) -> String {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        let head = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn the_page_is_live_and_strangers_are_refused() {
        let shared = Shared::default();
        let address = serve(Page::Run(Arc::clone(&shared)), 0).unwrap();
        assert!(address.ip().is_loopback());
        let page = ask(address, "/", "localhost:1");
        assert!(page.starts_with("HTTP/1.1 200"), "{page}");
        assert!(page.contains("\"live\":true"), "{page}");
        let title = "a run called by name";
        shared.lock().unwrap().title = title.to_owned();
        let data = ask(address, "/run.json", "127.0.0.1");
        assert!(data.contains(title) && data.contains("application/json"));
        for (path, host, want) in [
            ("/run.json", "evil.example", "HTTP/1.1 403"),
            ("/run.json", "127.0.0.1.evil.example", "HTTP/1.1 403"),
            ("/etc/passwd", "localhost", "HTTP/1.1 404"),
        ] {
            let got = ask(address, path, host);
            assert!(
                got.starts_with(want) && !got.contains(title),
                "{host}: {got}"
            );
        }
    }

    #[test]
    fn a_port_in_use_is_one_sentence() {
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        let error = serve(Page::Run(Shared::default()), port)
            .unwrap_err()
            .to_string();
        assert!(error.contains("cannot listen on 127.0.0.1:"), "{error}");
    }
}
