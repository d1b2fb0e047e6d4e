"""What a run achieved as one page of HTML, from `result.json` and `events.jsonl` alone."""
