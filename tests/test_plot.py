"""plot.py: where the curves lie, what the picture says, how mistakes end."""

import itertools
import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from support.scripts import ROOT, run

from training import checkpoint


def write_run(folder, records, tokens_per_step=100):
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text(
        json.dumps({'resolved': {'tokens_per_step': tokens_per_step}})
    )
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
    return folder


def evaluation(step, wall, train, loss=2.0):
    return dict(iter=step, val_loss=loss, wall_seconds=wall, train_seconds=train)


def line(step, ms, loss=3.0):
    return dict(iter=step, ms=ms, loss=loss, lr=1e-3 * (step == 2))


@pytest.fixture
def plot(monkeypatch, capsys, tmp_path):
    """plot(words…) -> (exit code, stdout, stderr, the script's globals); it runs in this process,
    in tmp_path."""

    def call(*words):
        monkeypatch.setattr(sys, 'argv', ['plot.py', *map(str, words)])
        monkeypatch.chdir(tmp_path)
        try:
            code, made = 0, runpy.run_path(str(ROOT / 'plot.py'))
        except SystemExit as end:
            code, made = end.code, {}
        return code, *capsys.readouterr(), made

    return call


@pytest.fixture
def finished(tmp_path):
    """A run of 10 steps: 5 s of start-up, 1 s a step, evaluations at 0, 5 and 10, of which the
    later two take 3 s each."""
    steps = [line(i, 1000.0, loss=4 - i / 10) for i in range(10)]
    return write_run(
        tmp_path / 'out-a',
        [
            evaluation(0, 5, 0, 4.0),
            *steps[:5],
            evaluation(5, 13, 5, 3.0),
            *steps[5:],
            evaluation(10, 21, 10, 2.5),
        ],
    )


def test_steps_lie_between_the_evaluations(plot, finished):
    code, out, _, made = plot(finished)
    assert (code, out) == (0, f'picture: {finished}/loss.png\n')
    assert (finished / 'loss.png').read_bytes()[:4] == b'\x89PNG'
    line_of_steps, evaluations = made['read'](finished, ['loss'])['loss']
    assert evaluations == [(5, 0, 4.0), (13, 500, 3.0), (21, 1000, 2.5)]
    assert [point[:2] for point in line_of_steps] == [
        *((5 + i, 100 * i) for i in range(5)),
        *((13 + i, 500 + 100 * i) for i in range(5)),
    ]


def test_steps_after_the_last_evaluation_take_what_was_logged(plot, tmp_path):
    # log_interval=4
    records = [evaluation(0, 5, 0), line(0, 900.0), line(4, 500.0), line(8, 500.0)]
    _, _, _, made = plot(write_run(tmp_path / 'going', records))
    assert [
        point[0] for point in made['read'](tmp_path / 'going', ['loss'])['loss'][0]
    ] == pytest.approx([5.9, 7.9, 9.9])


def test_a_first_evaluation_at_the_end_leaves_the_steps_before_it(plot, tmp_path):
    records = [line(0, 1e3), line(1, 1e3), evaluation(2, 9, 2)]
    _, _, _, made = plot(write_run(tmp_path / 'run', records))
    assert [point[0] for point in made['read'](tmp_path / 'run', ['loss'])['loss'][0]] == [7, 8]


def test_training_loss_is_the_mean_of_its_neighbours(plot, tmp_path):
    folder = write_run(tmp_path / 'run', [line(i, 1.0, loss=float(i % 2)) for i in range(1000)])
    _, _, _, made = plot(folder)
    smooth = [point[2] for point in made['read'](folder, ['loss'])['loss'][0]]
    assert smooth[0] == 0 and len(smooth) == 1000
    assert all(0.45 < value < 0.55 for value in smooth[10:-1])


def test_other_quantities_are_drawn_below_each_other(plot, finished):
    code, out, _, made = plot(finished, '--y=lr, loss,train_seconds')
    assert (code, out) == (0, f'picture: {finished}/lr-loss-train_seconds.png\n')
    axes = made['figure'].axes
    assert [a.get_ylabel() for a in axes] == [
        'lr',
        '',
        'loss (nats per token)',
        '',
        'train seconds',
        '',
    ]
    assert [a.get_xlabel() for a in axes] == ['', '', '', '', 'wall time (seconds)', 'tokens']
    assert [len(a.lines) for a in axes] == [1, 1, 2, 2, 1, 1]
    # a rate is neither smoothed nor cut off
    assert max(axes[0].lines[0].get_ydata()) == 1e-3 < axes[0].get_ylim()[1]
    assert list(axes[4].lines[0].get_ydata()) == [0, 5, 10] and axes[4].lines[0].get_marker() == 'o'
    assert axes[0].get_xlim() == axes[4].get_xlim()


def test_two_files_are_enough_of_a_run_that_was_resumed_and_set_aside(plot, trained, tmp_path):
    out_dir = shutil.copytree(trained, tmp_path / 'out')
    done = run('train.py', '--init_from=resume', '--max_iters=9', f'--out_dir={out_dir}')
    assert done.returncode == 0, done.stderr
    aside, copy = checkpoint.set_aside(out_dir), tmp_path / 'copy'
    copy.mkdir()
    for name in ('metrics.jsonl', 'config.json'):
        shutil.copy(aside / name, copy)
    logged = {
        key
        for line in (copy / 'metrics.jsonl').read_text().splitlines()
        for key, value in json.loads(line).items()
        if value is not None
    } - {'iter'}
    assert logged >= {
        'loss',
        'lr',
        'grad_norm',
        'tokens_per_second',
        'ms',
        'val_bpb',
        'tokens',
        'wall_seconds',
    }
    code, _, err, made = plot(copy, '--y=lr,val_bpb', '--out=two.png')
    assert (code, err) == (0, '') and Path('two.png').exists()
    assert all(map(any, made['read'](copy, logged).values()))
    steps, evaluations = made['read'](copy, ['loss'])['loss']
    assert [tokens for _, tokens, _ in steps] == [2 * 4 * 16 * i for i in range(9)]
    assert [tokens for _, tokens, _ in evaluations] == [2 * 4 * 16 * i for i in (0, 3, 6, 9)]
    assert all(
        a[0] < b[0] for points in (steps, evaluations) for a, b in itertools.pairwise(points)
    )  # time goes on
    assert made['read'](aside, ['loss']) == made['read'](copy, ['loss'])


def test_labels_overlap_neither_each_other_nor_a_curve(plot, tmp_path):
    folders = [
        write_run(
            tmp_path / f'out-{k}',
            [
                evaluation(i, 60 * i * (3 if k == 2 else 1), 60 * i, 4 - i / 10 + k / 500)
                for i in range(21)
            ],
        )
        for k in range(4)
    ]
    _, out, _, made = plot(*folders, '--names=first, second, third, $x$ of $y$')
    assert out == 'picture: loss.png\n'
    figure = made['figure']
    for axes, what in zip(figure.axes, ('wall time (minutes)', 'tokens')):  # 60 and 2,000 of them
        boxes = [text.get_window_extent() for text in axes.texts]
        assert [text.get_text() for text in axes.texts][::3] == ['first 2.000', '$x$ of $y$ 2.006']
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        assert all(box.x1 <= figure.bbox.x1 and box.y0 > axes.bbox.y0 for box in boxes)
        curves = [curve.get_transform().transform_path(curve.get_path()) for curve in axes.lines]
        assert not any(
            curve.intersects_bbox(box, filled=False) for curve in curves for box in boxes
        )
        assert axes.get_xlabel() == what


@pytest.mark.parametrize('last', ['{"iter": 11, "lo', '{"iter": 11,', '{'])
def test_a_half_written_line_is_left_out(plot, finished, last):
    with open(finished / 'metrics.jsonl', 'a') as file:
        file.write(last)
    code, out, err, _ = plot(finished, '--out=x.svg')
    assert code == 0 and out == 'picture: x.svg\n' and Path('x.svg').stat().st_size > 1000
    assert err == f'{finished}/metrics.jsonl: a line that is only half written is left out\n'


@pytest.mark.parametrize(
    'damage, words, message',
    [
        ('', [], '0 runs, 0 names'),
        ('', ['nowhere'], 'nowhere holds no run of train.py'),
        (
            '',
            ['.'],
            '. holds no run of train.py: metrics.jsonl or config.json is missing or damaged',
        ),
        ('', ['a', '--names=x,y'], '1 runs, 2 names'),
        ('', ['a', '--out=no/where.png'], 'cannot write no/where.png: No such file or directory'),
        ('', ['a', '--out=x.bmp2'], "Format 'bmp2' is not supported"),
        ('', ['a', '--out', 'b.png'], '--out has no value; write --out=VALUE'),
        ('', ['a', '--colour=red'], "there is no setting 'colour'"),
        (
            '',
            ['a', '--y=loss,lrr'],
            'a/metrics.jsonl has no lrr (y=), but iter, loss, lr, ms, train_seconds, val_loss',
        ),
        ('empty', ['a'], 'a/metrics.jsonl has no losses yet'),
        ('foreign', ['a'], 'a holds no run of train.py'),
        ('text', ['a'], 'a holds no run of train.py'),
        ('config', ['a'], 'a holds no run of train.py'),
    ],
)
def test_a_mistake_ends_in_one_line(plot, finished, tmp_path, damage, words, message):
    finished.rename(tmp_path / 'a')
    if damage == 'config':
        (tmp_path / 'a' / 'config.json').write_text('{"resolved": {')
    elif damage:
        text = {'empty': '', 'foreign': '{"step": 1}\n', 'text': '{"iter": "x", "loss": 1}\n'}[
            damage
        ]
        (tmp_path / 'a' / 'metrics.jsonl').write_text(text)
    code, out, err, _ = plot(*words)
    assert code == 2 and not out and err.startswith('error: ') and message in err, err
    assert err.count('\n') == 1 and not list(tmp_path.glob('**/*.tmp'))


@pytest.mark.skipif(sys.platform != 'linux', reason="names of files are text there")
def test_a_folder_whose_name_is_no_text(plot, finished):
    folder = finished.rename(finished.with_name('caf\udce9'))
    assert plot(folder)[0] == 0 and (folder / 'loss.png').exists()


def test_names_are_a_text_with_commas_or_a_list(plot, finished):
    assert list(plot(finished, "--names=['wide, slow']")[3]['runs']) == ['wide, slow']
    assert list(plot(finished, '--names=wide')[3]['runs']) == ['wide']
    code, _, err, _ = plot(finished, '--names=wide, slow')
    assert code == 2 and '1 runs, 2 names' in err


def test_without_matplotlib(plot, finished, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    code, _, err, _ = plot(finished)
    assert code == 2 and 'pip install matplotlib' in err and err.count('\n') == 1


def test_the_script_by_itself_and_without_torch(finished, tmp_path):
    (tmp_path / 'torch.py').write_text('raise RuntimeError("torch is slow to import")')
    done = run(
        ROOT / 'plot.py',
        'out-a',
        '--out=b.png',
        cwd=tmp_path,
        env={'DISPLAY': '', 'PYTHONPATH': str(tmp_path)},
    )
    assert (
        done.returncode == 0
        and done.stdout == 'picture: b.png\n'
        and os.path.isfile(tmp_path / 'b.png')
    ), done.stderr
