//! What a run leaves to be looked at: `metrics.jsonl`, TensorBoard events, a page that draws itself.
//! Invariant: watching never changes a run; a file that can no longer be written is said once, and the run goes on.
//! Absent on purpose: the terminal and the network. The page is given out as text.

mod metrics;
mod page;
mod record;
mod tensorboard;

pub use metrics::{METRICS_FILE, Metrics, line};
pub use page::{data, html};
pub use record::{Mark, Point, Record, Sample};
pub use tensorboard::{TensorBoard, masked_crc};
