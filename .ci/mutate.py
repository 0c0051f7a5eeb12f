"""Break the program on purpose, one place at a time, and see whether the tests notice.

    python .ci/mutate.py [--all] [FUNCTION ...]

Breaks each function in the program's sections 3 to 9 once, in a place that its name and source
decide (20 minutes), or with --all everywhere (hours). FUNCTION is a name like records or Reply.flush,
or a class. Needs pytest, bash and coreutils; works in a temporary copy. The status is 1 if the
tests all pass despite a mutation and EQUIVALENT does not say why.
"""
import ast
import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
PROGRAM, TESTS, SECTIONS = "ndjson_sse_proxy.py", "test_proxy.py", range(3, 10)
# The argument that is a text for people: no test should know it by heart, so it stays as it is.
MESSAGES = {"ProxyError": 1, "ValueError": 0, "broken_upstream": 0, "cut_upstream": 0, "say": 0}
EQUIVALENT = {  # a mutation as it is printed: why no test need notice
    'say_traceback #0: "error, by the proxy or by a hook:" -> "mutated"': "a text for people",
    'ChatStream.__init__ #3: 0 -> 1': "set before it is read",
    'refused #1: "" -> "mutated"': "the place of a value that is always None",
    'to_native_messages #12: "" -> "mutated"': "no call has this id, either",
    'ProxyServer.drain #7: 0.02 -> 0.0': "it only looks more often",
}
# A loop that no longer ends must not take all memory; but thread stacks reserve 8 GB of addresses.
COMMAND = 'ulimit -v 16000000; timeout -s KILL 180 "$0" -B -m pytest -xq --tb=no -p no:cacheprovider'
CONFTEST = "def pytest_collection_modifyitems(items): items.sort(key=lambda i: i.location[1] < %d)"


def children(node):
    """Return the nodes in a node, without annotations, docstrings and texts for people."""
    if isinstance(node, ast.JoinedStr) or isinstance(node, ast.Expr) and (
            isinstance(node.value, ast.Constant)):  # before 3.12 an f-string's parts have no place
        return []
    text = MESSAGES.get(getattr(node.func, "id", "")) if isinstance(node, ast.Call) else None
    return [value for field, values in ast.iter_fields(node)
            for i, value in enumerate(values if isinstance(values, list) else [values])
            if isinstance(value, ast.AST) and (field, i) != ("args", text)
            and field not in ("annotation", "returns", "decorator_list")]


def changes(node, text):
    """Yield the ways to break a node: (what to replace in it, by what)."""
    value = node.value if isinstance(node, ast.Constant) else None
    for test in getattr(node, "ifs", [getattr(node, "test", node)]):  # conditions and comparisons
        if isinstance(test, ast.Compare) == (test is node) and isinstance(test, (
                ast.Compare, ast.BoolOp, ast.Call, ast.Name, ast.Attribute, ast.Subscript)):
            yield test, f"(not ({text(test)}))"
    if isinstance(node, ast.BoolOp):
        other = " or " if isinstance(node.op, ast.And) else " and "
        yield node, "(" + other.join(f"({text(part)})" for part in node.values) + ")"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node, f"({text(node.operand)})"
    elif isinstance(node, ast.Raise) or isinstance(node, ast.Expr) and children(node):
        yield node, "pass"
    elif isinstance(node, ast.ExceptHandler):
        yield node.type, "()"  # catches nothing
    elif isinstance(node, ast.Call) and text(node.func).endswith("suppress"):
        yield node, f"{text(node.func)}()"
    elif isinstance(node, ast.JoinedStr) or isinstance(value, (str, bytes)):
        yield node, "b" * isinstance(value, bytes) + '"mutated"'
    elif isinstance(value, (bool, int, float)):  # a status becomes the next one
        yield node, repr(value + 1 if 400 <= value < 600 else type(value)(not value))


def mutations(source):
    """Return {function: [(title, start, end, new)]}. A syntax tree counts columns in bytes."""
    starts, found = [0, *(newline.end() for newline in re.finditer(b"\n", source))], {}

    def span(node):
        ends = (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)
        start, end = [starts[line - 1] + column for line, column in ends]
        return start, end, source[start:end].decode()

    def visit(node, name, here):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            name += "." * bool(name) + node.name
            here = found.setdefault(name, []) if isinstance(node, ast.FunctionDef) else None
        for child in children(node):
            visit(child, name, here)
        ways = [*changes(node, lambda part: span(part)[2])] if here is not None else []
        if isinstance(node, ast.FunctionDef) and not here:  # it has at least one
            ways = [(node.body[-1], "pass")]
        for (start, end, old), new in [(span(old), new) for old, new in ways]:
            title = re.sub(r"\s+", " ", f"{name} #{len(here)}: {old} -> {new}")
            here.append((title, start, end, new.encode()))
    visit(ast.parse(source), "", None)
    return found


def noticed_by(folder, program, line):
    """Run the tests from a line on, then the others. Return what failed (137: the time), or 0."""
    Path(folder, PROGRAM).write_bytes(program)
    Path(folder, "conftest.py").write_text(CONFTEST % line)
    done = subprocess.run(["bash", "-c", COMMAND, sys.executable], cwd=folder, check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    failed = re.search(r"(?m)^(?:FAILED|ERROR) (?:.*?::)?(.*?)(?: - |$)", done.stdout)
    return done.returncode and (failed[1] if failed else f"status {done.returncode}")


wanted, tried, survivors = set(sys.argv[1:]) - {"--all"}, 0, []
source, tests = [(TOP / name).read_bytes() for name in (PROGRAM, TESTS)]
with tempfile.TemporaryDirectory() as folder:
    for name in TESTS, "README.md":
        Path(folder, name).write_bytes((TOP / name).read_bytes())
    assert not noticed_by(folder, source, 0), "the tests fail without any mutation"
    for function, ways in mutations(source).items():
        section = source.count(b"\n# ---- ", 0, ways[0][1])
        line = tests.partition(b"\n# ---- %d. " % section)[0].count(b"\n")
        chosen = int(hashlib.sha256(function.encode()).hexdigest(), 16) % len(ways)
        if section in SECTIONS and (not wanted or wanted & {function, function.partition(".")[0]}):
            for title, start, end, new in ways if "--all" in sys.argv else [ways[chosen]]:
                by = noticed_by(folder, source[:start] + new + source[end:], line)
                print(f"line {source[:start].count(10) + 1}, {title}\n    ",
                      f"caught by {by}" if by else "NOT CAUGHT", flush=True)
                tried, survivors = tried + 1, survivors + [title] * (not by)
print(f"tried: {tried}, caught: {tried - len(survivors)}, survivors:",
      *(f"\n    {title} ({EQUIVALENT.get(title, 'not excused')})" for title in survivors))
sys.exit(not tried or not EQUIVALENT.keys() >= set(survivors))
