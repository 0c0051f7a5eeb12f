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
families = {family.name: family for family in text_string_to_metric_families(call("/metrics"))}
assert all(family.documentation and family.type != "unknown" for family in families.values()), families
buckets = [(float(sample.labels["le"]), sample.value)
           for sample in families["ndjson_sse_proxy_first_token_seconds"].samples
           if sample.name.endswith("_bucket")]
assert buckets == sorted(buckets) and buckets[-1][0] == float("inf"), buckets
counts = [b[1] for b in buckets]
assert counts == sorted(counts) and counts[-1] == 2, counts
tokens = {sample.labels["kind"]: sample.value for sample in families["ndjson_sse_proxy_tokens"].samples}
assert tokens["completion"] > 5, tokens
print("metrics as prometheus-client wants them:", ", ".join(sorted(families)))
