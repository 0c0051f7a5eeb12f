"""Run README's examples against --demo. Only the port is replaced.

    python .ci/with_servers.py --demo python .ci/readme_examples.py [FOLDER]

Runs the Python examples whose package is installed or, given a folder with node_modules, the
JavaScript examples.
"""
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
*folder, url, _ = sys.argv[1:]
MODULES = {"openai": "openai", "langchain-openai": "langchain_openai", "litellm": "litellm"}

tried = []
for kind, source in re.findall(r"^```(python|javascript)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE):
    package = re.match(r"(?:#|//) (?:pip|npm) install ([\w@/.-]+)", source)
    if not package or (kind == "javascript") != bool(folder):
        continue
    if kind == "python" and not importlib.util.find_spec(MODULES[package[1]]):
        continue
    source = source.replace("http://127.0.0.1:11435", url)
    if kind == "python":
        command = [sys.executable, "-c", source]
    else:
        script = Path(folder[0]) / f"readme-{package[1]}.mjs"
        script.write_text(source, encoding="utf-8")
        command = ["node", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("Hello! Every word"), (source, done)
    tried.append(package[1])
assert tried, "no example was tried"
print("README's examples as they stand:", ", ".join(tried))
