"""Check that the project stays small: lines, bytes, functions, classes, imports."""
import ast
import statistics
import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
BROAD = {"Exception", "BaseException"}
faults = []


def check(what, value, limit):
    if value > limit:
        faults.append(f"{what}: {value:g}, at most {limit}")


def file_size(name, max_lines, max_bytes, max_columns):
    """Check a file's size and return its text."""
    text = (TOP / name).read_text(encoding="utf-8")
    check(f"{name}, lines", len(text.splitlines()), max_lines)
    check(f"{name}, bytes", len(text.encode()), max_bytes)
    for number, line in enumerate(text.splitlines(), 1):
        check(f"{name}:{number}, columns", len(line), max_columns)
    return text


def is_broad(handler):
    """Tell whether an except clause catches everything."""
    return handler.type is None or bool(
        BROAD & {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)})


tree = ast.parse(file_size("ndjson_sse_proxy.py", 2000, 100 * 1024, 100))
file_size("test_proxy.py", 2650, float("inf"), 110)
file_size("README.md", 350, 20 * 1024, 110)

lengths, broad, modules = [], 0, set()
for node in ast.walk(tree):
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        lengths.append(node.end_lineno - node.lineno + 1)
        check(f"lines of {node.name}()", lengths[-1], 40)
    elif isinstance(node, ast.ClassDef):
        check(f"lines of class {node.name}", node.end_lineno - node.lineno + 1, 250)
    elif isinstance(node, ast.ExceptHandler):
        broad += is_broad(node)
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        modules |= {getattr(node, "module", None) or name.name for name in node.names}
check("median lines of a function", statistics.median(lengths), 8)
check("broad excepts", broad, 2)
# Python without site-packages has the standard library only.
code = "import " + ", ".join(sorted(modules))
done = subprocess.run([sys.executable, "-ISc", code], check=False, capture_output=True, text=True)
if done.returncode:
    faults.append("not in the standard library: " + done.stderr.strip().splitlines()[-1])
print("\n".join(faults) or "sizes: all within their limits")
sys.exit(bool(faults))
