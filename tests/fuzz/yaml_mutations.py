"""Changes to recipes in YAML: see `tests.fuzz.mutations`."""

import random

from tests.fuzz.mutations import odd, text_file, written

SCALARS = (
    "2020-13-45",
    "2020-01-01",
    "0x_",
    "0o17",
    "0b_",
    "1_000",
    "1:30",
    ".nan",
    "-.inf",
    "~",
    "yes",
    "'yes'",
    "!!int abc",
    "!!float x",
    "!!timestamp x",
    "!!binary '%%'",
    "!!python/object/apply:os.system [touch owned]",
    "!!python/name:os.system",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "[a, b",
    "{a: 1",
    "'open",
    '"\\ud800"',
    '"\\x1b[31m"',
    '"\\0"',
    '"two\\nlines"',
    "|\n  block\n  of text",
    "*nowhere",
    "&a [*a]",
    "? [a]",
    "- - - x",
    "[" * 3000,
    "[" * 3000 + "]" * 3000,
    "9" * 5000,
    "1e400",
    "-1",
    "0",
    "1000000000000",
    "''",
    "null",
    "{a: 1, a: 2}",
    "s3://user:SECRET@host/x",
    "caf\u00e9",
    "\u202etxt",
    "%",
    "@x",
    "`x`",
)
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 9)
)


def yaml_file(content: bytes, draw: random.Random) -> bytes:
    """Change a recipe: a value, a name, the lines, or its bytes."""
    kind = draw.random()
    if kind < 0.15:
        return text_file(content, draw)
    lines = content.decode().splitlines()
    at = draw.choice([index for index, line in enumerate(lines) if ":" in line])
    name = lines[at].partition(":")[0]
    if kind < 0.65:
        lines[at] = f"{name}: {draw.choice(SCALARS)}"
    elif kind < 0.7:  # aliases that make much of little
        lines = [*BOMB.splitlines(), *lines]
        lines[-1 if draw.random() < 0.5 else at] = f"{name.strip()}: *a8"
    elif kind < 0.76:
        lines.insert(at, f"{name}: {draw.choice(SCALARS)}")
    elif kind < 0.82:
        lines[at] = f"{draw.choice(SCALARS)}: {lines[at].partition(':')[2]}"
    elif kind < 0.88:
        lines.insert(
            at, draw.choice(("<<: *x", "---", "...", "\tx: 1", "unknown: 1", "? x", "- x", "%YAML 9.9", "#\x07"))
        )
    elif kind < 0.94:
        lines[at] = f"{name}: {written(odd(draw))}"
    else:
        return draw.choice(SCALARS).encode()
    return "\n".join(lines).encode(errors="surrogatepass")
