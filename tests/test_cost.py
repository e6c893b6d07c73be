"""What the guarantees cost: of a step, looking for signals and bad steps; of a save, the sums and
the syncs.

Measured inside real runs; `pytest -m campaign -n 0 -s tests/test_cost.py` prints the figures.
"""

import json
import os
import runpy
import sys
import time

import pytest
import torch
from support.scripts import ROOT

from system import files
from training import checkpoint, distributed, guard

pytestmark = pytest.mark.campaign


class Timed:
    """Replaces functions by ones that add up the time they take."""

    def __init__(self, monkeypatch, *functions):
        self.seconds = {name: [] for _, name in functions}
        for owner, name in functions:
            monkeypatch.setattr(owner, name, self._wrapped(name, getattr(owner, name)))

    def _wrapped(self, name, function):
        def timed(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name].append(time.perf_counter() - start)

        return timed


@pytest.mark.parametrize(
    'arguments',
    [
        ['config/train_shakespeare_char.py', '--max_iters=60'],
        ['config/speedrun_short.py'],
        ['config/baseline_shakespeare_char.py', '--max_iters=200'],
    ],
    ids=lambda arguments: arguments[0][7:-3],
)
def test_looking_for_signals_and_bad_steps_costs_less_than_half_a_percent_of_a_step(
    arguments, tmp_path, monkeypatch
):
    if arguments[0] == 'config/train_shakespeare_char.py' and not os.environ.get('NANOGPT_MIRROR'):
        pytest.skip("needs tiny Shakespeare")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        sys,
        'argv',
        [
            'train.py',
            *arguments,
            '--compile=False',
            '--eval_interval=0',
            '--log_interval=10',
            '--eval_iters=1',
            f'--out_dir={tmp_path}',
            '--device=cpu',
        ],
    )
    timed = Timed(
        monkeypatch,
        (guard.Guard, 'mark_if_bad'),
        (guard.Guard, 'last_skipped'),
        (distributed, 'any_rank_each'),
        (distributed, 'all_reduce_sum'),
    )
    steps = Timed(monkeypatch, (torch.Tensor, 'backward'))
    start = time.perf_counter()
    runpy.run_path(str(ROOT / 'train.py'), run_name='__main__')
    lines = [line for line in map(json.loads, (tmp_path / 'metrics.jsonl').open()) if 'ms' in line]
    n, step = len(steps.seconds['backward']), sorted(line['ms'] for line in lines)[len(lines) // 2]
    median = {
        name: 1e6 * sorted(seconds)[len(seconds) // 2] for name, seconds in timed.seconds.items()
    }
    share = sum(median.values()) / (1e3 * step)
    print(
        f"\n{arguments[0]}: {n} steps of {step:.1f} ms; microseconds a step: "
        + ', '.join(f'{name} {value:.0f}' for name, value in median.items())
        + f"; together {share:.3%} ({time.perf_counter() - start:.0f} s)"
    )
    assert share < 0.005


@pytest.mark.parametrize('millions', [10, 124])
def test_sums_and_syncs_cost_less_than_a_twentieth_of_a_save_or_a_second(
    millions, tmp_path, monkeypatch
):
    state = dict(
        model={'w': torch.randn(millions * 1_000_000)},
        model_args={},
        optimizer={
            'exp_avg': torch.randn(millions * 1_000_000),
            'exp_avg_sq': torch.randn(millions * 1_000_000),
        },
    )
    taken = {'with': [], 'without': []}
    for _ in range(10):  # in turns
        for kind in taken:
            with monkeypatch.context() as patch:
                if kind == 'without':
                    patch.setattr(files, 'sha256', lambda path: '')
                    patch.setattr(os, 'fsync', lambda descriptor: None)
                start = time.perf_counter()
                checkpoint.save(tmp_path, 'ckpt.pt', state)
                taken[kind].append(time.perf_counter() - start)
    median = {kind: sorted(seconds)[5] for kind, seconds in taken.items()}
    extra = median['with'] - median['without']
    print(
        f"\n{millions} million parameters, {millions * 12 / 1000:.2f} GB: a save takes {median['with']:.2f} s, "
        f"without sums and syncs {median['without']:.2f} s"
    )
    assert extra < 1 or extra < 0.05 * median['with']
