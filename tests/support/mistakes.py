"""What a script does about a user's mistake: one line on stderr, and exit code 2."""


def check(done, *parts):
    """`done` ended on a user's mistake, with these parts in its one line."""
    assert done.returncode == 2, done.stdout[-500:] + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith('error: ') and len(line) < 500
    for part in parts:
        assert part in line
    return line
