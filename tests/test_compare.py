"""compare.py: the table is what the runs logged; the picture has a point for each."""

import json

import pytest
from support.scripts import run


def write(folder, loss, n_params, seconds, model='gpt'):
    folder.mkdir()
    config = {'model': model, 'resolved': {'n_params': n_params}}
    (folder / 'config.json').write_text(json.dumps(config))
    first = {'iter': 0, 'tokens': 0, 'val_loss': 4.2, 'val_bpb': 6.0, 'train_seconds': 0.0}
    last = {
        'iter': 9,
        'tokens': 50_000,
        'val_loss': loss,
        'val_bpb': loss / 0.6931,
        'train_seconds': seconds,
    }
    lines = [
        json.dumps(first),
        json.dumps({'iter': 8, 'loss': 3.0}),
        json.dumps(last),
        '{"iter": 10, "val_lo',
    ]
    (folder / 'metrics.jsonl').write_text('\n'.join(lines))
    return folder


def test_the_table_is_what_was_logged(tmp_path):
    a, b = write(tmp_path / 'a', 1.5, 800_000, 60.0), write(tmp_path / 'b', 2.25, 0, 0.5, 'bigram')
    done = run('compare.py', a, b, '--names=large, counted', f'--out={tmp_path / "c.png"}')
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[2:4] == [
        '| counted | bigram | 0 | 50k | 0 s | 100k | 2.2500 | 3.2463 |',
        '| large | gpt | 800k | 50k | 1:00 min | 833 | 1.5000 | 2.1642 |',
    ]
    assert (tmp_path / 'c.png').read_bytes()[:4] == b'\x89PNG'


@pytest.mark.parametrize(
    'arguments, message',
    [
        ((), 'give the out_dir of at least one run'),
        (('nowhere',), 'nowhere holds no evaluated run'),
    ],
)
def test_mistakes(arguments, message):
    done = run('compare.py', *arguments)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
