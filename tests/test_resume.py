"""A resumed run is the uninterrupted one, to the bit; and whatever is left out of a saved state,
that comparison fails."""

import dataclasses
import functools
import math
import shutil
import sys

import pytest
import torch
from support.forked import run, train
from support.hooks import around_saves, keep_each
from support.outcomes import learned, outcome
from support.scripts import TINY

from training import checkpoint, guard

pytestmark = pytest.mark.skipif(sys.platform == 'win32', reason="no fork here")

# ---- exact resume --------------------------------------------------------------------------------

# Settings besides TINY's (one layer, dropout 0.1, two micro-batches a step, evaluated every third
# step), processes.
KINDS = {
    'bfloat16': (['--dtype=bfloat16'], 1),
    'float16, one evaluation': (['--dtype=float16', '--eval_interval=0'], 1),
    'float32, two ranks': ([], 2),
}
MUON = ['--model=modern', '--muon_lr=0.02', '--embed_lr=0.1', '--weight_decay=0.1']
MORE = {
    'float32': ([], 1),
    'no dropout, no accumulation': (
        ['--dropout=0.0', '--gradient_accumulation_steps=1', '--eval_interval=1'],
        1,
    ),
    'bfloat16, two ranks': (
        ['--dtype=bfloat16', '--eval_interval=0', '--gradient_accumulation_steps=4'],
        2,
    ),
    'float16, two ranks': (['--dtype=float16'], 2),
    'modern, Muon': (MUON, 1),
    'modern, Muon, two ranks': (MUON, 2),
    'in shards, two ranks': (['--parallel=fsdp'], 2),
    'in shards, Muon, two ranks': ([*MUON, '--parallel=fsdp'], 2),
    'sgd': (['--optimizer=sgd', '--max_norm=0.4'], 1),
    'batch norm': (['--model=mlp', '--batchnorm=ema'], 1),
    'watched': (['--watch=True', '--grad_clip=0.5'], 1),
}


def settings_of(text_folder, kind):
    words, processes = (KINDS | MORE)[kind]
    foreign = ('--n_layer', '--n_head', '--dropout') if '--model=mlp' in words else ()
    return [
        *(word for word in TINY if not word.startswith(foreign)),
        *words,
        f'--dataset={text_folder}',
    ], processes


def saved_each_step(tmp_path, settings, processes):
    """The outcome of a run, and a folder with what each of its steps would leave if it were cut
    there."""
    keep = functools.partial(around_saves, after=functools.partial(keep_each, tmp_path / 'cuts'))
    train(tmp_path / 'saving', *settings, '--save_minutes=1e-9', processes=processes, hook=keep)
    return outcome(tmp_path / 'saving'), tmp_path / 'cuts'


@pytest.mark.parametrize(
    'kind, cuts',
    [(kind, [4]) for kind in KINDS]
    + [pytest.param(kind, range(1, 6), marks=pytest.mark.campaign) for kind in KINDS | MORE],
)
def test_a_resumed_run_is_the_uninterrupted_one(text_folder, tmp_path, kind, cuts):
    settings, processes = settings_of(text_folder, kind)
    train(tmp_path / 'whole', *settings, processes=processes)
    whole = outcome(tmp_path / 'whole')
    saving, folder = saved_each_step(tmp_path, settings, processes)
    assert saving == whole  # saving changes nothing
    for cut in cuts:
        train(folder / str(cut), '--init_from=resume', processes=processes)
        assert outcome(folder / str(cut)) == whole, cut
    print(f"\n{kind}: cut at steps {[*cuts]}: equal to {whole[0][:16]}")


# ---- and whatever is left out of the state, the comparison fails ---------------------------------

# What may be missing or wrong in a checkpoint without changing a run, and why. All else must be
# missed.
GUARD_NOW = [
    f'progress.guard.{name}'
    for name in ('allowance', 'not_finite', 'low_since_jump', 'evals_since_low')
]
INFORMS = {  # by the beginning of its name
    'versions.': "says what wrote it, for people",
    'template': "is taken from the data again; sample.py wants it",
    'resolved.': "is what 'auto' meant, and this run says all it wants; the next test is about it",
    **{
        f'progress.{field.name}': field.metadata['without_effect']
        for field in dataclasses.fields(checkpoint.Progress)
        if 'without_effect' in field.metadata
    },
    **dict.fromkeys(
        GUARD_NOW,
        "tells of trouble that this run does not have: test_guard.py resumes in the middle of it",
    ),
    'optimizer.param_groups.*': "holds options, and those of the run that goes on win: they come from its config",
}
GUARD = [
    f'progress.guard.{name}'
    for name in guard.Guard(0.0, 0.0).state()
    if f'progress.guard.{name}' not in GUARD_NOW
]
PROGRESS = [
    f'progress.{field.name}'
    for field in dataclasses.fields(checkpoint.Progress)
    if 'without_effect' not in field.metadata and field.name != 'guard'
]
MATTERS = [  # the others, settings apart
    'model.*',
    'model_name',
    'tokenizer',
    'iter_num',
    'best_val_loss',
    'optimizer.state.*.exp_avg',
    'optimizer.state.*.exp_avg_sq',
    'optimizer.state.*.step',
    'optimizer.param_groups.*.params',
    'optimizer.param_groups.*.muon',
    'scaler.scale',
    'scaler._growth_tracker',
    'scaler.growth_factor',
    'scaler.backoff_factor',
    'scaler.growth_interval',
    *PROGRESS,
    *GUARD,
]
LONG = {
    '*',
    'model_name',
    'scaler.growth_factor',
    'scaler.backoff_factor',
    'scaler.growth_interval',
    'optimizer.param_groups.*.muon',
    *(set(GUARD) - {'progress.guard.seen', 'progress.guard.average'}),
}  # the campaign's
SETTINGS = ('config.', 'model_args.')


def items(state, path=()):
    """{kind: the first path of that kind} of all there is in a state: names of parameters and
    numbers count as one kind."""
    found = {}
    inner = (
        state.items()
        if isinstance(state, dict)
        else enumerate(state)
        if isinstance(state, list)
        else ()
    )
    if not inner or path in (('tokenizer',), ('template',)) or path[-1:] == ('params',):
        is_one_of_many = path[0] in ('model', 'optimizer')
        return {
            '.'.join(
                '*'
                if is_one_of_many and (isinstance(key, int) or path[:i] == ('model',))
                else str(key)
                for i, key in enumerate(path)
            ): path
        }
    for key, value in inner:
        found = items(value, (*path, key)) | found
    return found


def damaged(state, path, how):
    """A copy of the state in which the item at `path` is left out or another one."""
    *way, last = path
    inside, copy = state.copy(), state
    copy, at = inside, inside
    for key in way:
        at[key] = at[key].copy()
        at = at[key]
    if how == 'missing':
        del at[last]
    else:
        at[last] = other(at[last])
    return copy


def other(value):
    """Another value of its type."""
    match value:
        case torch.Tensor():
            return torch.zeros_like(value) if value.any() else torch.ones_like(value)
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return 1.0 if math.isinf(value) else 1.5 * value + 1
        case str():
            return value + 'x'
        case dict():
            return {'kind': 'byte'}
        case list():
            return value[1:]
    return 'x'


def misses(folder, scratch, path, whole):
    """Whether a run notices that this item of its state in `folder` is not what it was: it refuses,
    or ends elsewhere."""
    state = checkpoint.read(folder / 'ckpt.pt')
    for how in ('missing', 'other'):
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(folder, scratch)
        for name in ('sums.json', 'ckpt.prev.pt', 'best.pt'):
            (scratch / name).unlink(missing_ok=True)
        torch.save(damaged(state, path, how), scratch / 'ckpt.pt')
        if (
            run('train.py', '--init_from=resume', f'--out_dir={scratch}').returncode
            or outcome(scratch) != whole
        ):
            return True
    return False


@pytest.fixture(scope='module')
def one_cut(text_folder, tmp_path_factory):
    """(what one step of a run left, the outcome of the whole run, the kinds of items in its
    state)."""
    settings = [
        *TINY,
        '--dtype=float16',
        '--eval_interval=1',
        '--learning_rate=1',
        '--decay_lr=False',
        f'--dataset={text_folder}',
    ]
    whole, folder = saved_each_step(tmp_path_factory.mktemp('cut'), settings, 1)
    states = [checkpoint.read(path) for path in sorted(folder.glob('[1-5]/ckpt.pt'))]
    state = states[-1]
    # something to forget
    assert state['progress']['bad_evals'] > 1 < learned(folder / '6')['progress']['bad_evals']
    return folder / str(state['iter_num']), whole, items(state)


def test_of_every_item_of_the_state_we_know_whether_it_matters(one_cut):
    kinds = [kind for kind in one_cut[2] if not kind.startswith(SETTINGS)]
    assert set(MATTERS) <= set(kinds)
    assert [
        kind for kind in kinds if kind not in MATTERS and not kind.startswith(tuple(INFORMS))
    ] == []


@pytest.mark.parametrize(
    'kind',
    [
        pytest.param(kind, marks=pytest.mark.campaign) if kind in LONG else kind
        for kind in [*MATTERS, '*']
    ],
)
def test_what_matters_is_missed_and_what_informs_is_not(one_cut, tmp_path, kind):
    folder, whole, found = one_cut
    if kind != '*':
        assert misses(folder, tmp_path / 'scratch', found[kind], whole)
    for name in found if kind == '*' else ():
        if name.startswith(tuple(INFORMS)) and name not in MATTERS:
            assert not misses(folder, tmp_path / 'scratch', found[name], whole), name


@pytest.mark.campaign
def test_a_run_goes_on_with_its_settings(one_cut, tmp_path):
    """Those that it misses are all but: the default here (eot, gelu, bias); what another place says
    (the shape: model_args, model_args.dropout: config); what one more step at a constant rate does
    not show (warmup_lr, eval_interval); what changes no number."""
    folder, whole, found = one_cut
    no_number = (
        'profile deterministic gradient_checkpointing wandb_run_name wandb_project wandb_log save_minutes '
        'always_save_checkpoint init_from out_dir'
    )
    shown_elsewhere = 'eot gelu bias n_embd n_head n_layer model warmup_lr eval_interval'
    unseen = {f'config.{key}' for key in f'{no_number} {shown_elsewhere}'.split()} | {
        'model_args.dropout'
    }
    kinds = [kind for kind in found if kind.startswith(SETTINGS) and kind != 'config.compile']
    missed = {kind for kind in kinds if misses(folder, tmp_path / 'scratch', found[kind], whole)}
    assert unseen.isdisjoint(missed) and len(missed) > 35
    print(
        f"\n{len(missed)} of {len(kinds)} settings are missed; not: {sorted(set(kinds) - missed)}"
    )
