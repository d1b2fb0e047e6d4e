"""Names of what a run keeps in its output directory."""

STATE = "run.json"
RESULT = "result.json"
EVENTS = "events.jsonl"
PRUNED, RECOVERED = "pruned", "recovered"  # folders of a pipeline's output, one for each step that makes a model
