"""/metrics of the demo (argument 1), after some traffic, read by prometheus-client's parser."""
import json
import sys
import urllib.error
import urllib.request

from prometheus_client.parser import text_string_to_metric_families


def call(path: str, body: object = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(sys.argv[1] + path, data), timeout=30) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.read().decode()


for model in "demo-text", "demo-error", 'no"such\\model\n':
    call("/v1/chat/completions", {"model": model, "messages": []})
call("/nosuch")
values = {(sample.name, *sample.labels.values()): sample.value
          for family in text_string_to_metric_families(call("/metrics")) for sample in family.samples}
assert values["ndjson_sse_proxy_first_token_seconds_count",] == 2, values
assert values["ndjson_sse_proxy_tokens_total", "completion"] > 5, values
print("metrics as prometheus-client wants them:", ", ".join(sorted({name for name, *_ in values})))
