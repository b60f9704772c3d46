"""What /metrics tells, in Prometheus' text format."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = {"namespace": "mmrecipes", "registry": self.registry}
        self.requests = Counter("requests", "requests to /v1/chat/completions, by HTTP status", ["status"], **own)
        self.answers = Counter("answers", "answers that ended, by finish_reason", ["finish_reason"], **own)
        self.prompt_tokens = Counter("prompt_tokens", "tokens of prompts of answers that ended", **own)
        self.cached_tokens = Counter("prompt_tokens_cached", "of these, tokens that were read for another prompt before", **own)
        self.generated_tokens = Counter("generated_tokens", "tokens generated, also for answers that were cancelled", **own)
        self.image_hits = Counter("image_cache_hits", "images and tiles not encoded again", **own)
        self.image_misses = Counter("image_cache_misses", "images and tiles encoded", **own)
        self.admitted = Gauge("requests_admitted", "requests that hold a place: read, waiting or running", **own)
        self.running = Gauge("requests_running", "rows of the batch", **own)
        self.first_token = Histogram("first_token_seconds", "from the request to its first token", buckets=SECONDS, **own)
        self.seconds = Histogram("answer_seconds", "from the request to its last token", buckets=SECONDS, **own)
        self.batch = Histogram("batch_rows", "rows of each step", buckets=(1, 2, 4, 8, 16, 32, 64), **own)
