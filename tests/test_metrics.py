"""What a run tells: to TensorBoard and wandb the same as to metrics.jsonl, and beside which
published figures."""

import json
import shutil
import struct
import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
from support.scripts import TINY, run

from model import GPT, GPTConfig
from training.console import PUBLISHED, evaluation_table
from training.metrics import Metrics, logger_names


def train(out_dir, *arguments, **options):
    done = run('train.py', *arguments, f'--out_dir={out_dir}', **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def records(out_dir):
    return [json.loads(line) for line in (out_dir / 'metrics.jsonl').read_text().splitlines()]


# ---- loggers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'log_to, wandb_log, expected',
    [
        ('', False, []),
        ('', True, ['wandb']),
        ('wandb', True, ['wandb']),
        ('wandb', False, ['wandb']),
        (' wandb , tensorboard,', False, ['tensorboard', 'wandb']),
        ('tensorboard', True, ['tensorboard', 'wandb']),
    ],
)
def test_one_setting_names_the_loggers_and_nanogpts_still_works(log_to, wandb_log, expected):
    assert logger_names(log_to, wandb_log) == expected


@pytest.mark.parametrize(
    'log_to, near',
    [('tensorbord', 'tensorboard'), ('tensorboard,WandB', 'wandb'), ('W&B', 'wandb')],
)
def test_an_unknown_logger_ends_in_one_line(tmp_path, log_to, near):
    with pytest.raises(ValueError, match=f'nearest is {near!r}'):
        logger_names(log_to)
    if log_to == 'tensorbord':
        done = run(
            'train.py', *TINY, '--dataset=random', f'--log_to={log_to}', f'--out_dir={tmp_path}/out'
        )
        assert done.returncode == 2 and done.stderr.count('\n') == 1 and near in done.stderr
        assert not (tmp_path / 'out').exists()


def test_a_missing_package_is_said_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    # torch.utils.tensorboard: an earlier test may have imported it, with tensorboard
    for module in ('tensorboard', 'torch.utils.tensorboard', 'wandb'):
        monkeypatch.setitem(sys.modules, module, None)
    log = Metrics(tmp_path, True)
    log.start({}, ['tensorboard', 'wandb'])
    for line, package in zip(
        capsys.readouterr().out.splitlines(), ('tensorboard', 'wandb'), strict=True
    ):
        assert line.startswith(
            f'{package} is not installed (pip install {package}): continuing without it'
        )
    log.log({'iter': 0, 'loss': 2.0})
    log.close()
    assert len(records(tmp_path)) == 1 and not (tmp_path / 'tensorboard').exists()


def points(pairs):
    """{name: [(step, value)]} of (step, {name: value}); TensorBoard keeps 32 bits of a value."""
    found = {}
    for step, values in pairs:
        for name in values.keys() - {'iter'}:
            if values[name] is not None:
                found.setdefault(name, []).append((step, float(np.float32(values[name]))))
    return found


def events(out_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(out_dir / 'tensorboard')).Reload()
    return {
        name: [(event.step, event.value) for event in log.Scalars(name)]
        for name in log.Tags()['scalars']
    }


def test_tensorboard_shows_what_metrics_jsonl_has(trained, tmp_path):
    """Also what was logged before it was asked for; and after a resume no step that the lost part
    of the run had done."""
    pytest.importorskip('tensorboard')
    out_dir = shutil.copytree(trained, tmp_path / 'out')
    train(out_dir, '--init_from=resume', '--max_iters=8', '--log_to=tensorboard')
    assert events(out_dir) == points((record['iter'], record) for record in records(out_dir))
    # step 6: 6 and 7 come again, the evaluation at 6 does not
    (out_dir / 'ckpt.prev.pt').replace(out_dir / 'ckpt.pt')
    train(out_dir, '--init_from=resume', '--max_iters=9', '--log_to=tensorboard')
    assert [step for step, _ in events(out_dir)['loss']] == [*range(9)]
    assert events(out_dir) == points((record['iter'], record) for record in records(out_dir))


def history(path):
    """(step, {name: value}) of the rows in the file of an offline run: LevelDB's log format behind
    seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at = path.read_bytes(), 7
    assert len(data) < 1 << 15  # one block
    while at < len(data):
        size = struct.unpack_from('<IHB', data, at)[1]
        record = wandb_internal_pb2.Record.FromString(data[at + 7 : at + 7 + size])
        at += 7 + size
        if record.HasField('history'):
            row = {
                ''.join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.history.item
            }
            yield row['_step'], {name: value for name, value in row.items() if name[0] != '_'}


def test_wandb_offline_has_what_metrics_jsonl_has(text_folder, tmp_path):
    pytest.importorskip('wandb.proto.wandb_internal_pb2')
    train(
        tmp_path / 'out',
        *TINY,
        f'--dataset={text_folder}',
        '--wandb_log=True',
        env={
            'HOME': str(tmp_path),
            'WANDB_DIR': str(tmp_path),
            'WANDB_MODE': 'offline',
            'WANDB_SILENT': 'true',
        },
    )
    (path,) = tmp_path.glob('wandb/offline-run-*/run-*.wandb')
    assert points(history(path)) == points(
        (record['iter'], record) for record in records(tmp_path / 'out')
    )


class FakeWandb(types.ModuleType):
    """wandb, as far as metrics.py uses it: what it is given is kept."""

    errors = SimpleNamespace(Error=type('Error', (Exception,), {}))

    def __init__(self, has_login=True):
        super().__init__('wandb')
        self.has_login, self.asked, self.rows, self.is_finished = has_login, None, [], False

    def login(self, **_):
        return self.has_login

    def init(self, **asked):
        self.asked = asked
        return SimpleNamespace(
            id=asked['id'] or 'new',
            log=lambda values, step: self.rows.append((step, values)),
            finish=lambda: setattr(self, 'is_finished', True),
        )


@pytest.fixture
def start(monkeypatch, tmp_path):
    """start(wandb, …) -> Metrics of a run in tmp_path that logs to it; the rest goes to Metrics,
    wandb_id to its start."""
    monkeypatch.delenv('WANDB_MODE', raising=False)

    def call(wandb, *where, wandb_id=None):
        monkeypatch.setitem(sys.modules, 'wandb', wandb)
        log = Metrics(tmp_path, True, *where)
        log.start({'wandb_project': 'p', 'wandb_run_name': 'r', 'n_layer': 2}, ['wandb'], wandb_id)
        return log

    return call


def test_wandb_gets_the_settings_and_every_record(start, tmp_path):
    wandb = FakeWandb()
    log = start(wandb)
    log.log({'iter': 0, 'loss': 2.0, 'mfu': None})
    log.log({'iter': 1, 'loss': float('nan'), 'lr': 0.1})
    log.close()
    assert (
        wandb.rows == [(0, {'iter': 0, 'loss': 2.0}), (1, {'iter': 1, 'lr': 0.1})]
        and wandb.is_finished
    )
    assert records(tmp_path)[1] == {'iter': 1, 'loss': None, 'lr': 0.1}
    assert wandb.asked['config'] == json.loads((tmp_path / 'config.json').read_text())
    assert (wandb.asked['project'], wandb.asked['name'], wandb.asked['mode'], log.wandb_id) == (
        'p',
        'r',
        None,
        'new',
    )


def test_a_resumed_run_goes_on_in_wandb_and_a_new_logger_gets_what_was_before(start):
    log = start(FakeWandb())
    for i in range(3):
        log.log({'iter': i, 'loss': 1.0})
    log.close()
    goes_on, new = FakeWandb(), FakeWandb()
    assert (
        start(goes_on, 2, wandb_id='old').wandb_id == 'old'
        and goes_on.asked['id'] == 'old'
        and goes_on.rows == []
    )
    start(new, 2)
    assert [step for step, _ in new.rows] == [0, 1]


def test_no_login_and_a_wandb_that_does_not_start_are_said(start, capsys, tmp_path):
    wandb = FakeWandb(has_login=False)
    start(wandb)
    assert wandb.asked['mode'] == 'offline' and 'no login' in capsys.readouterr().out
    wandb.init = lambda **_: (_ for _ in ()).throw(wandb.errors.Error('the disk\nis full'))
    log = start(wandb)
    log.log({'iter': 0, 'loss': 2.0})
    assert (
        'wandb does not start (the disk is full): continuing without it' in capsys.readouterr().out
    )
    assert log.wandb_id is None and len(records(tmp_path)) == 1


# ---- the table of an evaluation ------------------------------------------------------------------


def table(name='gpt2', folder='openwebtext', vocab_size=50257, block_size=1024, bpb=None):
    data = SimpleNamespace(
        folder=SimpleNamespace(name=folder),
        vocab_size=vocab_size,
        block_size=block_size,
        bits_per_byte=lambda split, loss: bpb,
    )
    model = SimpleNamespace(num_params=lambda: 124_439_808)
    return evaluation_table(name, model, {'train': 3.1134, 'val': 3.1249}, data).split('\n')


def test_the_measured_row_stands_among_the_published_ones():
    lines = table('gpt2-medium', bpb=1.0)
    assert len({len(line) for line in lines}) == 1  # aligned
    assert [line.split() for line in lines[1:]] == [
        ['gpt2', '124M', '-', '-', '-', '3.11', '3.12'],
        ['gpt2-medium', '124M', '3.1134', '3.1249', '1.0000', '2.85', '2.84'],
        ['gpt2-large', '774M', '-', '-', '-', '2.66', '2.67'],
        ['gpt2-xl', '1.56B', '-', '-', '-', '2.56', '2.54'],
    ]


def test_another_model_has_no_published_figures_of_its_own():
    lines = table('out, step 20')
    assert lines[5].split() == ['out,', 'step', '20', '124M', '3.1134', '3.1249', '-', '-']
    assert [line.split()[0] for line in lines[1:5]] == list(PUBLISHED)


@pytest.mark.parametrize(
    'other', [dict(folder='shakespeare'), dict(block_size=512), dict(vocab_size=65)]
)
def test_other_data_has_no_published_figures(other):
    assert [line.split() for line in table(**other)] == [
        ['model', 'parameters', 'train', 'loss', 'val', 'loss'],
        ['gpt2', '124M', '3.1134', '3.1249'],
    ]


@pytest.mark.parametrize('name', PUBLISHED)
def test_the_published_parameters_are_those_of_the_architecture(name):
    n_layer, n_embd = {
        'gpt2': (12, 768),
        'gpt2-medium': (24, 1024),
        'gpt2-large': (36, 1280),
        'gpt2-xl': (48, 1600),
    }[name]
    assert PUBLISHED[name][0] == (50257 + 1024 + 2) * n_embd + n_layer * n_embd * (12 * n_embd + 13)


def test_eval_gpt2_prints_the_table(tmp_path):
    """With random weights in the place of OpenAI's, in files like theirs, on tokens in the place of
    OpenWebText."""
    from safetensors.torch import save_file

    config = dict(n_layer=1, n_head=1, n_embd=8, vocab_size=50257)
    weights = {
        name: weight.t().contiguous()
        if name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight'))
        else weight
        for name, weight in GPT(GPTConfig(**config)).state_dict().items()
        if name != 'lm_head.weight'
    }
    for folder in ('gpt2', 'openwebtext'):
        (tmp_path / folder).mkdir()
    save_file(weights, tmp_path / 'gpt2' / 'model.safetensors')
    (tmp_path / 'gpt2' / 'config.json').write_text(
        json.dumps(dict(model_type='gpt2', n_positions=1024, **config))
    )
    for split in ('train', 'val'):
        np.arange(2000, dtype=np.uint16).tofile(tmp_path / 'openwebtext' / f'{split}.bin')
    out = train(
        tmp_path / 'out',
        'config/eval_gpt2.py',
        f"--dataset={tmp_path / 'openwebtext'}",
        '--device=cpu',
        '--dtype=float32',
        '--batch_size=1',
        '--eval_iters=1',
        env={'NANOGPT_MIRROR': str(tmp_path)},
    )
    lines = [line.split() for line in out.splitlines()]
    assert [line[0] for line in lines[-5:]] == ['model', *PUBLISHED] and not (
        tmp_path / 'out'
    ).exists()
    measured = lines[-4]
    assert measured[4:] == ['3.11', '3.12'] and all(
        float(loss) == pytest.approx(np.log(50257), abs=0.1) for loss in measured[2:4]
    )
