"""A user's mistakes: one line on stderr that says what, where and what to do; exit code 2; nothing
lost.

The scripts run as a user runs them, but forked from a process that has torch loaded already
(`warm`, of conftest.py).
"""

import gzip
import io
import json
import os
import pickle
import re
import shutil
import warnings
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from support.datasets import write_text
from support.mistakes import check
from support.outcomes import same
from support.scripts import TINY, run

import models
from system import files
from system.device import resolve_device, resolve_dtype
from text import meta_pkl, tokenizer
from text.dataset import Dataset
from training import checkpoint, pretrained, resume
from training.optimizer import load_optimizer_state


def changed(folder, name, content):
    """`folder` with one file's content replaced; None deletes it."""
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def copy(text_folder, trained, tmp_path):
    """copy('text') or copy('run') -> a copy of the dataset, or of the run, to be damaged."""

    def make(what):
        return shutil.copytree({'text': text_folder, 'run': trained}[what], tmp_path / what)

    return make


@pytest.fixture
def train(warm, text_folder, tmp_path):
    """train(*arguments) -> a tiny run of train.py; a mistake is noticed before there is an
    out_dir."""

    def go(*arguments):
        done = warm(
            'train.py',
            *TINY,
            '--max_iters=1',
            f'--dataset={text_folder}',
            f'--out_dir={tmp_path / "out"}',
            *arguments,
        )
        assert done.returncode == 0 or not (tmp_path / 'out').exists(), done.stderr
        return done

    return go


# ---- settings ------------------------------------------------------------------------------------

SETTINGS = [
    (
        '--learnin_rate=1',
        "command line: there is no setting 'learnin_rate'; the nearest is 'learning_rate'",
    ),
    ('--learning-rate=1', 'written --key=value, with _ in the key'),
    ('--batch_size', '--batch_size has no value; write --batch_size=VALUE'),
    ('--batch_size=4.5', 'batch_size takes a whole number, not 4.5'),
    ('--learning_rate=fast', "learning_rate takes a number, not 'fast'"),
    ('--bias=2', 'bias takes True or False, not 2'),
    ('--n_expert=8', "there is no setting 'n_expert'"),
    ('--gelu=swish', "gelu='swish' is unknown: use exact, tanh, relu"),
    ('config/nope.py', "there is no config file 'config/nope.py'"),
    ('train.py', 'train.py is the script, not a config file'),
    ('--batch_size=0', 'batch_size=0 must be at least 1'),
    ('--block_size=-1', 'block_size=-1 must be at least 1'),
    ('--eval_iters=0', 'eval_iters=0 must be at least 1'),
    ('--log_interval=0', 'log_interval=0 must be at least 1'),
    ('--gradient_accumulation_steps=0', 'gradient_accumulation_steps=0 must be at least 1'),
    ('--n_embd=17', 'n_embd=17 is not divisible by n_head=2'),
    ('--n_head=0', 'n_head=0: a GPT needs at least 1'),
    ('--dropout=1', 'dropout=1.0 must be at least 0 and below 1'),
    ('--dropout=-0.1', 'dropout=-0.1'),
    ('--learning_rate=-1', 'learning_rate=-1'),
    ('--beta2=1', '1.0'),
    ('--model=mamba9', "model='mamba9' is unknown; the nearest is"),
    ('--device=gpu', "device='gpu' is unknown: use auto, cpu, cuda"),
    ('--dtype=fp16', "dtype='fp16' is unknown: use auto, float32, bfloat16 or float16"),
    ('--compile=maybe', "compile='maybe' is unknown: use True, False or auto"),
    ('--attention=flash', "attention='flash' is unknown: use auto, sdpa or plain"),
    *[
        (word, word[2:].split('=')[0])
        for word in (
            '--max_iters=-1',
            '--seed=-1',
            '--grad_clip=-1',
            '--weight_decay=-1',
            '--min_lr=-1',
            '--warmup_iters=-1',
            '--eval_interval=-1',
            '--save_minutes=-1',
            '--early_stop=-1',
            '--muon_lr=-1',
            '--embed_lr=-1',
            '--head_lr=-1',
            '--cooldown=-1',
        )
    ],
    ('--cooldown=1.5', 'cooldown=1.5 must be at most 1'),
    ('--learning_rate=0 --muon_lr=0.1', 'learning_rate=0 with another rate above 0'),
    ('--model=modern --n_embd=18', 'n_embd=18 is not divisible by 2 x n_head=2'),
    ('--model=modern --ngram=1', 'ngram=1: use 0 for none, or'),
    ('--ngram=4', "there is no setting 'ngram'"),
    (
        '--model=modern --muon_lr=0.1 --embed_lr=0.1 --head_lr=0.1',
        'learning_rate=0.01 trains nothing here',
    ),
    ('--model=modern --bias=True', 'model=modern has no bias'),
    ('--backend=mpi', "backend='mpi' is unknown"),
    ('--compile=0', 'compile=0 is unknown'),
    (f'--n_embd={2**40}', 'a GPT of these sizes has inf GB of weights, and this machine has'),
    ('--n_embd=1000000', 'a GPT of these sizes has 48,'),
    (f'--n_layer={10**9}', 'n_layer=1000000000 must be at most 10000'),
]


@pytest.mark.parametrize('word, message', SETTINGS)
def test_a_wrong_setting(train, word, message):
    check(train(*word.split()), message)


@pytest.mark.parametrize(
    'text, message',
    [
        ('batch_sise = 4', "there is no setting 'batch_sise'; the nearest is 'batch_size'"),
        ('batch_size = "4"', "batch_size takes a whole number, not '4'"),
        ('batch_size = 4\nn_layer = = 3', ', line 2: invalid syntax'),
        ('import os\nout_dir = os.environ["NOT_SET"]', ", line 2: KeyError: 'NOT_SET'"),
        ('raise RuntimeError("one\\ntwo")', ', line 1: RuntimeError: one two'),
    ],
)
def test_a_wrong_config_file_is_named(train, tmp_path, text, message):
    (tmp_path / 'my.py').write_text(text)
    check(train(tmp_path / 'my.py'), f'{tmp_path / "my.py"}', message)


def test_one_mistake_without_the_fork():
    check(run('train.py', '--learnin_rate=1'), "the nearest is 'learning_rate'")


def test_processes_share_the_micro_batches_evenly(warm, text_folder):
    done = warm('train.py', *TINY, f'--dataset={text_folder}', env={'WORLD_SIZE': '4', 'RANK': '0'})
    check(done, 'gradient_accumulation_steps=2', 'not a multiple of 4 processes')


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none():
    for device in ('cuda', 'cuda:1'):
        with pytest.raises(
            ValueError, match=f"device='{device}' is not available here: use --device=auto"
        ):
            resolve_device(device)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has MPS")
def test_mps_where_there_is_none():
    with pytest.raises(ValueError, match="device='mps' is not available here: use --device=auto"):
        resolve_device('mps')


@pytest.mark.parametrize(
    'call, message',
    [
        (lambda: resolve_device('cuda:x'), "device='cuda:x' is unknown"),
        (lambda: resolve_device(0), 'device=0 is unknown'),
        (lambda: resolve_dtype('float64', 'cpu'), "dtype='float64' is unknown"),
        (lambda: resolve_dtype(16, 'cpu'), 'dtype=16 is unknown'),
        (
            lambda: resolve_dtype('bfloat16', 'mps'),
            'mps has no bfloat16 in hardware; use --dtype=float16',
        ),
        (lambda: models.build('nope'), "model='nope' is unknown"),
        (lambda: tokenizer.load({'kind': 'bpe'}), 'its kind must be char'),
        (lambda: tokenizer.load({'kind': 'char'}), 'its kind must be char (with chars)'),
        (lambda: tokenizer.load('char'), 'unknown tokenizer char'),
        (
            lambda: tokenizer.load({'kind': 'tiktoken', 'name': 'gpt5'}),
            "tiktoken has no encoding 'gpt5': use one of gpt2",
        ),
        (
            lambda: meta_pkl.describe_meta_pkl(pickle.dumps({'itos': {1: 'a'}})),
            'meta.pkl has no vocab_size',
        ),
        (lambda: meta_pkl.describe_meta_pkl(b''), 'meta.pkl cannot be read'),
    ],
)
def test_values_that_a_module_does_not_know(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


# ---- data ----------------------------------------------------------------------------------------


def ids(*values):
    return np.array(values, np.uint16).tobytes()


def meta(**change):
    whole = {'tokenizer': {'kind': 'byte'}, 'vocab_size': 256, 'dtype': 'uint16', 'splits': {}}
    return json.dumps({**whole, **change}).encode()


@pytest.mark.parametrize(
    'name, content, message',
    [
        ('train.bin', None, 'train.bin is missing'),
        ('val.bin', None, 'val.bin is missing'),
        ('train.bin', b'', 'train.bin holds 0 token(s)'),
        ('train.bin', ids(1), 'train.bin holds 1 token(s): too few'),
        ('val.bin', ids(1), 'val.bin holds 1 token(s)'),
        ('train.bin', ids(*range(8)), 'block_size=16 is larger than the train split'),
        ('train.bin', ids(*range(16)), 'block_size=16 is larger than the train split'),
        (
            'train.bin',
            ids(*range(40), 60000),
            'train.bin holds the id 60000, but its vocabulary has',
        ),
        ('val.bin', ids(1, 60000), 'val.bin holds the id 60000'),
        ('train.bin', ids(*range(40)), 'meta.json'),
        ('train.bin', bytes(7201), 'train.bin is not a whole number of uint16 ids'),
        ('meta.json', b'', 'meta.json cannot be read'),
        ('meta.json', b'{', 'meta.json cannot be read'),
        ('meta.json', b'\xff{}', 'meta.json cannot be read'),
        ('meta.json', b'{}', 'meta.json cannot be read'),
        ('meta.json', b'[]', 'meta.json cannot be read'),
        ('meta.json', meta(dtype='int99'), 'meta.json cannot be read'),
        ('meta.json', meta(dtype='object'), 'meta.json cannot be read'),
        ('meta.json', meta(dtype='float32'), 'meta.json cannot be read'),
        ('meta.json', meta(vocab_size='256'), 'meta.json cannot be read'),
        ('meta.json', meta(tokenizer={'kind': 'bpe'}), 'meta.json'),
        ('meta.json', meta(tokenizer='byte'), 'meta.json'),
        ('meta.json', meta(splits=[]), 'meta.json'),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value)[:30],
)
def test_wrong_data(copy, name, content, message):
    folder = changed(copy('text'), name, content)
    with pytest.raises((ValueError, OSError), match=re.escape(message)) as caught:
        Dataset(str(folder), block_size=16, batch_size=4)
    assert str(folder) in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'word, message',
    [
        ('--dataset=nope', 'data/nope/train.bin is missing'),
        ('--dataset=shakespear_char', "; the nearest is 'shakespeare_char'"),
        ('--dataset=', 'train.bin is missing'),
        ('--block_size=4000', 'block_size=4000 is larger than the train split'),
    ],
)
def test_wrong_data_ends_train(train, word, message):
    check(train(word), message)


def test_a_hostile_meta_pkl_does_nothing(copy, tmp_path):
    folder = changed(copy('text'), 'meta.json', None)
    changed(folder, 'meta.pkl', pickle.dumps({'itos': Payload(tmp_path / 'pwned')}))
    with pytest.raises(ValueError, match='meta.pkl asks for posix.system; it may hold only'):
        Dataset(str(folder), 16, 4)
    assert not (tmp_path / 'pwned').exists()


def test_a_download_is_what_was_expected_or_not_there(tmp_path, monkeypatch):
    (tmp_path / 'mirror').mkdir()
    monkeypatch.setenv('NANOGPT_MIRROR', str(tmp_path / 'mirror'))
    with pytest.raises(
        OSError, match='cannot download .*No such file.* put the file at .*here.txt by hand'
    ):
        files.download('https://example.com/a.txt', tmp_path / 'here.txt', '0' * 64, 'a.txt')
    (tmp_path / 'mirror' / 'a.txt').write_text('something else')
    with pytest.raises(ValueError, match='is not the expected file: its sha256 is .*, not 0000'):
        files.download('https://example.com/a.txt', tmp_path / 'here.txt', '0' * 64, 'a.txt')
    assert os.listdir(tmp_path) == ['mirror']


def test_a_run_whose_tokenizer_cannot_be_downloaded_succeeded(copy, warm, tmp_path):
    folder = changed(copy('text'), 'meta.json', None)  # so its ids are GPT-2's
    done = warm(
        'train.py', *TINY, f'--dataset={folder}', f'--out_dir={tmp_path / "run2"}', sample=True
    )
    assert (
        (tmp_path / 'run2' / 'ckpt.pt').exists()
        and done.returncode == 0
        and 'TIKTOKEN_CACHE_DIR' in done.stdout
    )


# ---- checkpoints ---------------------------------------------------------------------------------


class Payload:
    """What unpickles to a shell command that leaves a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f'touch {self.marker}',)


def saved(value, as_zip=True):
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=as_zip)
    return buffer.getvalue()


def foreign_zip(data):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        archive.writestr('../../evil.txt', 'text')
    return buffer.getvalue()


def flip(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def flipped(share):
    return lambda data: flip(data, int(share * (len(data) - 1)))


def boundaries(data):
    """Where the parts of a zip archive begin: each member, its data, the directory, the last
    record."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [info.header_offset for info in archive.infolist()]
        return [*members, *(at + 30 for at in members), archive.start_dir, data.rindex(b'PK\5\6')]


def rezipped(packing=zipfile.ZIP_STORED, more=(), declared=None):
    """The same archive written anew, perhaps packed, with more members, or one that says it has so
    many bytes."""

    def rezip(data):
        buffer = io.BytesIO()
        with (
            warnings.catch_warnings(),
            zipfile.ZipFile(io.BytesIO(data)) as old,
            zipfile.ZipFile(buffer, 'w', packing) as new,
        ):
            warnings.simplefilter('ignore')  # of a name that comes twice
            for name, content in [
                *((info.filename, old.read(info)) for info in old.infolist()),
                *more,
            ]:
                new.writestr(name, content)
            new.infolist()[-1].file_size = declared or new.infolist()[-1].file_size
        return buffer.getvalue()

    return rezip


def with_state(**change):
    """The same checkpoint with other values; ... leaves one out."""

    def change_state(data):
        state = torch.load(io.BytesIO(data), weights_only=True)
        new = state | {
            key: value(state[key]) if callable(value) else value for key, value in change.items()
        }
        return saved({key: value for key, value in new.items() if value is not ...})

    return change_state


def in_its_place(make):
    """Not a file with other content, but another thing of its name."""

    def put(path):
        path.unlink()
        make(path)

    return put


def weight(value):
    return with_state(model=lambda weights: {**weights, 'transformer.wte.weight': value})


DAMAGE = {
    'no bytes': lambda data: b'',
    'one byte': lambda data: b'P',
    'half': lambda data: data[: len(data) // 2],
    'all but one byte': lambda data: data[:-1],
    'the second half': lambda data: data[len(data) // 2 :],
    'behind the first member': lambda data: data[: boundaries(data)[1]],
    'in front of the directory': lambda data: data[: boundaries(data)[-2]],
    'in front of the last record': lambda data: data[: boundaries(data)[-1]],
    'a flipped bit': flipped(0.5),
    'a flipped bit in a header': lambda data: flip(data, 30),
    'a flipped bit in the directory': lambda data: flip(data, boundaries(data)[-2] + 16),
    'a flipped bit in the last record': lambda data: flip(data, boundaries(data)[-1]),
    'zeros in the middle': lambda data: data[:10_000] + bytes(10_000) + data[20_000:],
    'text': lambda data: b'not a checkpoint\n',
    'a web page': lambda data: b'<!doctype html><html><title>404 Not Found</title></html>',
    "git-lfs's pointer": lambda data: (
        b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n'
    ),
    'safetensors': lambda data: safetensors.torch.save({'w': torch.ones(3)}),
    'gzip of it': gzip.compress,
    "torch.save's old format": lambda data: saved(
        torch.load(io.BytesIO(data), weights_only=True), False
    ),
    'a foreign zip': foreign_zip,
    'packed': rezipped(zipfile.ZIP_DEFLATED),
    'a bomb': rezipped(zipfile.ZIP_DEFLATED, [('archive/data/999', bytes(5_000_000))]),
    'a name twice': lambda data: rezipped(
        more=[(zipfile.ZipFile(io.BytesIO(data)).namelist()[0], b'')]
    )(data),
    'more than it has': rezipped(declared=1 << 40),
    'a tensor': lambda data: saved(torch.ones(3)),
    'a list': lambda data: saved([1, 2]),
    'a state dict': lambda data: saved({'wte': torch.ones(3)}),
    'a pickled object': lambda data: saved({'model': SimpleNamespace(), 'model_args': {}}),
    'no weights': with_state(model=...),
    'no model_args': with_state(model_args=...),
    'no config': with_state(config=...),
    'no step': with_state(iter_num=...),
    'no loss': with_state(best_val_loss=...),
    'no optimizer': with_state(optimizer=...),
    'weights that are none': with_state(model=[1]),
    'weights by number': with_state(model={1: torch.ones(3)}),
    'a weight that is a number': weight(3.0),
    'a sparse weight': weight(torch.eye(3).to_sparse()),
    'a stretched weight': weight(torch.ones(1).expand(1 << 40)),
    'a weight that is no number': weight(torch.tensor([1.0, float('nan')])),
    'step -1': with_state(iter_num=-1),
    'a step as text': with_state(iter_num='6'),
    'a config as list': with_state(config=[]),
    'losses': with_state(best_val_loss=torch.ones(2)),
    'an optimizer as text': with_state(optimizer='adamw'),
    'progress as list': with_state(progress=[]),
    'an evaluation as text': with_state(progress={'evaluated': '3'}),
    'a guard as text': with_state(progress={'guard': 'x'}),
    'a guard whose average is text': with_state(progress={'guard': {'average': '3'}}),
    'resolved as number': with_state(resolved=3),
    'threads as text': with_state(resolved={'threads': 'all'}),
}
PLACES = {
    'a folder': in_its_place(os.mkdir),
    'a pipe': in_its_place(os.mkfifo),
    'a device': in_its_place(lambda path: os.symlink('/dev/zero', path)),
    'a link to nowhere': in_its_place(lambda path: os.symlink('nowhere', path)),
    'a link to itself': in_its_place(lambda path: os.symlink(path.name, path)),
    'not for us': lambda path: path.chmod(0),
}


def said_and_passed_over(run, damage, capsys):
    """ckpt.pt, damaged, is named in one line and the one before it is taken; where that is gone
    too, it is an error."""
    path = run / 'ckpt.pt'
    if damage in PLACES:
        PLACES[damage](path)
    else:
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
    before = torch.load(run / 'ckpt.prev.pt', weights_only=True)
    assert same(checkpoint.read_latest(run), before)
    said = capsys.readouterr().out
    assert (
        len(said.splitlines()) == 1
        and str(path) in said
        and f'resuming from {run / "ckpt.prev.pt"} instead' in said
    )

    (run / 'ckpt.prev.pt').unlink()
    with pytest.raises(
        OSError if damage == 'not for us' else ValueError, match=re.escape(str(path))
    ) as caught:
        checkpoint.read_latest(run)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 500


@pytest.mark.parametrize('damage', [*DAMAGE, *PLACES])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(copy, damage, capsys):
    if damage == 'not for us' and os.geteuid() == 0:
        pytest.skip("root may read everything")
    said_and_passed_over(changed(copy('run'), 'sums.json', None), damage, capsys)


@pytest.mark.parametrize(
    'content', [None, b'{"ckpt.pt": 3}', b'', b'[]', b'{"ckpt.pt": ', b'\xff\xfe', b'[' * 100_000]
)
def test_a_damaged_list_of_sums_is_as_none(copy, capsys, content):
    run = changed(copy('run'), 'sums.json', content) if content is not None else copy('run')
    whole = checkpoint.read_latest(run)
    assert whole['iter_num'] == 6 and not capsys.readouterr().out
    said_and_passed_over(run, 'a flipped bit', capsys)


def test_a_checkpoint_cut_at_any_boundary_is_damaged(copy):
    run = changed(copy('run'), 'sums.json', None)
    data = (run / 'ckpt.pt').read_bytes()
    assert len(boundaries(data)) > 20
    for at in boundaries(data):
        changed(run, 'ckpt.pt', data[:at])
        with pytest.raises(ValueError, match='is damaged or not a checkpoint'):
            checkpoint.read(run / 'ckpt.pt')


def test_what_no_check_would_find(copy, monkeypatch, capsys):
    """Without the sums outside and inside, a flipped bit in a weight is loaded without a word."""
    run = changed(copy('run'), 'sums.json', None)
    whole, data = checkpoint.read(run / 'ckpt.pt'), (run / 'ckpt.pt').read_bytes()
    at = data.index(whole['model']['transformer.wte.weight'].numpy().tobytes())
    changed(run, 'ckpt.pt', flip(data, at))
    with pytest.raises(ValueError, match='a checksum inside it is wrong'):
        checkpoint.read(run / 'ckpt.pt')
    monkeypatch.setattr(zipfile.ZipFile, 'testzip', lambda archive: None)
    assert not same(checkpoint.read(run / 'ckpt.pt'), whole)


@pytest.mark.parametrize(
    'at',
    [0, 0.001, 0.01, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1],
)
def test_a_flipped_bit_without_sums_is_found_or_harmless(copy, at):
    run = changed(copy('run'), 'sums.json', None)
    whole = checkpoint.read(run / 'ckpt.pt')
    changed(run, 'ckpt.pt', flipped(at)((run / 'ckpt.pt').read_bytes()))
    try:
        assert same(checkpoint.read(run / 'ckpt.pt'), whole)
    except ValueError as error:
        assert 'is damaged or not a checkpoint' in str(error) or 'might run code' in str(error)


@pytest.mark.parametrize(
    'wrap',
    [
        lambda p: saved({'model': p, 'model_args': {}}),
        pickle.dumps,
        lambda p: saved({'model': {}, 'model_args': {}, 'config': p}),
    ],
)
def test_a_hostile_checkpoint_does_nothing(copy, tmp_path, wrap):
    run = changed(copy('run'), 'sums.json', None)
    changed(run, 'ckpt.pt', wrap(Payload(tmp_path / 'pwned')))
    for name in ('ckpt.prev.pt', 'best.pt'):
        (run / name).unlink()
    for read in (checkpoint.read_latest, pretrained.open_model, pretrained.load_model):
        with pytest.raises(
            ValueError, match=r'ckpt\.pt (is damaged or not a checkpoint|.*might run code)'
        ):
            read(run)
    assert not (tmp_path / 'pwned').exists()


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(model_name='nope'), "model='nope' is unknown"),
        (dict(model_name=3), 'model=3 is unknown'),
        (dict(model_args={'n_layer': 2}), "no GPT's of such sizes"),
        (dict(model_args={'zzz': 1}), "not those of a GPT"),
        (dict(model_args={'n_layer': 'x'}), "not those of a GPT"),
        (dict(model={}), "not those of a GPT"),
    ],
)
def test_weights_that_do_not_fit(trained, change, message):
    state = checkpoint.read(trained / 'ckpt.pt')
    with pytest.raises(ValueError, match=message) as caught:
        pretrained.restore_model({**state, **change})
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'words, parts',
    [
        (['--n_layer=2'], ['has n_layer=1, not 2 (command line)', 'remove this setting']),
        (['--gelu=tanh'], ["has gelu='exact', not 'tanh' (command line)"]),
        (['--block_size=8'], ['has block_size=16']),
        (['--model=mamba9'], ["has model='gpt', not 'mamba9' (command line)"]),
        (['--dropout=2'], ['dropout=2.0']),
        (['--batch_size=0'], ['batch_size=0 must be at least 1']),
    ],
)
def test_resuming_another_run_than_asked_for(warm, trained, words, parts):
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    check(
        warm('train.py', '--init_from=resume', f'--out_dir={trained}', '--max_iters=9', *words),
        *parts,
    )
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before


@pytest.mark.parametrize(
    'change',
    [
        dict(batch_size='4'),
        dict(batch_size=4.0),
        dict(batch_size=True),
        dict(learning_rate=None),
        dict(decay_lr=1),
        dict(dataset=3),
        dict(n_head=[2]),
    ],
)
def test_resuming_with_settings_of_other_types(trained, change):
    """What a checkpoint's config says is taken as it is, or not at all."""
    config = {
        'batch_size': 12,
        'learning_rate': 6e-4,
        'decay_lr': True,
        'dataset': 'x',
        'n_head': 12,
        'compile': 'auto',
    }
    theirs = {'batch_size': 4, 'learning_rate': 1, 'compile': False, **change}
    state = {**checkpoint.read(trained / 'ckpt.pt'), 'config': theirs}
    with pytest.raises(ValueError, match=f'RUN is damaged: its {min(change)} is'):
        resume.adopt_settings(dict(config), {}, resume.run_settings(state), 'RUN', set())
    for key in change:
        del theirs[key]
    resume.adopt_settings(config, {}, resume.run_settings(state), 'RUN', set())


@pytest.mark.parametrize(
    'change',
    [
        dict(param_groups=3),
        dict(param_groups=[]),
        dict(param_groups=[{}]),
        dict(state=[]),
        dict(state={0: 3}),
        dict(state={0: {}, 1: {'step': torch.ones(())}}),
        dict(state={0: {'exp_avg': 'x', 'exp_avg_sq': 'x', 'step': 1.0}}),
        dict(
            state={
                0: {'exp_avg': torch.ones(1), 'exp_avg_sq': torch.ones(1), 'step': torch.ones(())}
            }
        ),
        dict(state={'0': {'momentum_buffer': torch.ones(3)}, 0: {'nope': torch.ones(3)}}),
    ],
    ids=lambda change: str(change)[:60],
)
def test_resuming_with_moments_that_are_none(trained, change):
    state = checkpoint.read(trained / 'ckpt.pt')
    model = pretrained.restore_model(state)[0]
    own = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
    load_optimizer_state(own, state['optimizer'])
    with pytest.raises(
        ValueError, match="the checkpoint's optimizer state (is damaged|does not fit)"
    ) as caught:
        load_optimizer_state(own, {**state['optimizer'], **change})
    assert '\n' not in str(caught.value)


def test_resuming_a_model_of_another_name(copy, warm):
    run = changed(copy('run'), 'sums.json', None)
    changed(run, 'ckpt.pt', saved({**checkpoint.read(run / 'ckpt.pt'), 'model_name': 'other'}))
    check(
        warm('train.py', '--init_from=resume', f'--out_dir={run}', '--model=gpt'),
        "has model='other'",
    )


@pytest.mark.parametrize('name', ['nothing', 'a file', ''])
def test_resuming_where_there_is_no_run(warm, tmp_path, name):
    (tmp_path / 'a file').write_text('x')
    out_dir = tmp_path / name if name else ''
    done = warm('train.py', '--init_from=resume', f'--out_dir={out_dir}')
    check(done, f"out_dir='{out_dir}' has no ckpt.pt to resume from")


def test_a_misspelt_init_from_is_told_before_data_is_prepared(warm):
    done = warm('train.py', '--init_from=resum', '--dataset=openwebtext', '--device=cpu')
    assert done.returncode == 2 and "'resum' does not exist; the nearest is 'resume'" in done.stderr


@pytest.mark.parametrize(
    'script, words, near',
    [
        ('sample.py', '--out_dir={folder}/out-shakespear', '{folder}/out-shakespeare'),
        ('sample.py', '--init_from={folder}/exportd', '{folder}/exported'),
        ('sample.py', '--init_from=gpt2-x1', 'gpt2-xl'),
        ('train.py', '--init_from={folder}/out-shakespeer', '{folder}/out-shakespeare'),
        ('train.py', '--init_from=scrach', 'scratch'),
        (
            'train.py',
            '--init_from=resume --out_dir={folder}/out-shakespear',
            '{folder}/out-shakespeare',
        ),
        (
            'train.py',
            '--init_from=resume --out_dir={folder}/out-shakespears',
            '{folder}/out-shakespeare',
        ),
    ],
)
def test_a_run_that_is_nearly_another(warm, text_folder, tmp_path, script, words, near):
    """Named is the nearest folder that holds a model."""
    for name in ('out-shakespeare/ckpt.pt', 'exported/config.json', 'out-shakespears/text.txt'):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    data = [f'--dataset={text_folder}', *TINY] if script == 'train.py' else []
    done = warm(script, *words.format(folder=tmp_path).split(), *data, cwd=tmp_path)
    check(done, f"; the nearest is '{near.format(folder=tmp_path)}'")


def test_a_damaged_checkpoint_and_the_scripts(copy, warm):
    run = copy('run')
    changed(run, 'ckpt.pt', flipped(0.5)((run / 'ckpt.pt').read_bytes()))
    done = warm('train.py', '--init_from=resume', f'--out_dir={run}', '--max_iters=7')
    assert (
        done.returncode == 0
        and not done.stderr
        and 'resuming from' in done.stdout
        and 'iter 6:' in done.stdout
    )
    changed(run, 'ckpt.pt', flipped(0.5)((run / 'ckpt.pt').read_bytes()))
    changed(run, 'ckpt.prev.pt', b'')
    changed(run, 'best.pt', b'')
    check(
        warm('train.py', '--init_from=resume', f'--out_dir={run}', '--max_iters=8'),
        'ckpt.pt',
        'its sha256 differs',
    )
    check(warm('sample.py', f'--out_dir={run}'), 'best.pt', 'its sha256 differs')


def test_resuming_from_weights_alone(copy, warm):
    run = changed(copy('run'), 'sums.json', None)
    changed(run, 'ckpt.pt', (run / 'best.pt').read_bytes())
    check(
        warm('train.py', '--init_from=resume', f'--out_dir={run}', '--max_iters=9'), 'weights only'
    )


def test_a_damaged_metrics_file(copy, warm):
    run = copy('run')
    with open(run / 'metrics.jsonl', 'ab') as file:
        file.write(b'\xff\xfe')
    done = warm('train.py', '--init_from=resume', f'--out_dir={run}', '--max_iters=7')
    assert done.returncode == 0, done.stderr


# ---- models from elsewhere -----------------------------------------------------------------------


def hugging_face(folder, config, **content):
    folder.mkdir()
    (folder / 'config.json').write_text(config if isinstance(config, str) else json.dumps(config))
    for name, data in content.items():
        (folder / name.replace('_bin', '.bin').replace('_safetensors', '.safetensors')).write_bytes(
            data
        )
    return folder


SMALL = dict(model_type='gpt2', n_embd=16, n_layer=1, n_head=2, n_positions=16, vocab_size=65)


@pytest.mark.parametrize(
    'config, content, message',
    [
        ({'model_type': 'bloom'}, {}, "model_type='bloom' is not supported, only gpt2"),
        ({}, {}, 'model_type is missing; supported are gpt2'),
        (SMALL, {}, 'has no model.safetensors or pytorch_model.bin'),
        (
            SMALL,
            {'pytorch_model_bin': saved({'wte.weight': torch.ones(65, 16)})},
            'has the weights of 0 layers',
        ),
        (
            SMALL,
            {'pytorch_model_bin': saved({'h.0.ln_1.weight': torch.ones(16)})},
            "weights are missing or don't fit",
        ),
        (
            {**SMALL, 'activation_function': 'silu'},
            {},
            "activation_function='silu' is not supported, only gelu",
        ),
        ('', {}, 'hf/config.json'),
        ('[]', {}, 'hf'),
        ({'model_type': 'gpt2'}, {}, 'hf'),
        (SMALL, {'pytorch_model_bin': b''}, 'pytorch_model.bin'),
        (SMALL, {'pytorch_model_bin': 'hostile'}, 'pytorch_model.bin'),
        (SMALL, {'model_safetensors': b'\xff' * 100}, 'model.safetensors'),
    ],
)
@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_a_folder_that_holds_no_gpt2(tmp_path, config, content, message):
    hostile = pickle.dumps(Payload(tmp_path / 'pwned'))
    folder = hugging_face(
        tmp_path / 'hf', config, **{k: hostile if v == 'hostile' else v for k, v in content.items()}
    )
    with pytest.raises((ValueError, OSError), match=re.escape(message)) as caught:
        pretrained.open_model(str(folder))
    assert '\n' not in str(caught.value) and str(folder) in str(caught.value)
    assert not (tmp_path / 'pwned').exists()


@pytest.mark.parametrize(
    'init_from, message',
    [
        ('gpt2', 'cannot download config.json of openai-community/gpt2: no answer, and'),
        (
            'gpt3',
            "'gpt3' does not exist; the nearest is 'gpt2'; the names that need no folder are gpt2, gpt2-medium",
        ),
        ('', 'no Hugging Face model'),
        ('resumee', "'resumee' does not exist"),
        ('train.py', 'train.py is damaged or not a checkpoint'),
    ],
)
def test_training_from_what_is_not_there(train, init_from, message):
    check(train(f'--init_from={init_from}'), message)


@pytest.mark.parametrize('script', ['train.py', 'sample.py'])
def test_a_folder_of_another_model_type(warm, tmp_path, text_folder, script):
    folder = hugging_face(tmp_path / 'hf', {'model_type': 'bloom'})
    words = [f'--dataset={text_folder}', *TINY] if script == 'train.py' else []
    check(
        warm(script, f'--init_from={folder}', *words),
        f"{folder}",
        "model_type='bloom' is not supported, only gpt2",
    )


def test_a_longer_context_than_the_pretrained_model_has(train, trained):
    check(
        train(f'--init_from={trained}', '--block_size=32'),
        'block_size=32 must be from 1 to 16, the positions that this model has',
    )


def test_another_shape_than_the_pretrained_model_has(train, trained):
    check(train(f'--init_from={trained}', '--n_layer=3'), 'n_layer')


def test_the_data_was_encoded_for_another_model(train, trained, tmp_path):

    other = write_text(tmp_path / 'other', 'abc def ' * 100)
    check(
        train(f'--init_from={trained}', f'--dataset={other}'), 'was prepared with another tokenizer'
    )


# ---- where results go ----------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['a file', 'a file/below', ''])
def test_an_out_dir_that_cannot_be_written(train, tmp_path, name):
    (tmp_path / 'a file').write_text('precious')
    out_dir = tmp_path / name if name else ''
    check(
        train(f'--out_dir={out_dir}'),
        f"out_dir='{out_dir}' can't be written to",
        'choose another --out_dir',
    )
    assert (tmp_path / 'a file').read_text() == 'precious'


@pytest.mark.parametrize('fills', ['ckpt.pt', ('metrics.jsonl')])
def test_a_full_disk_ends_the_run_and_it_can_be_resumed(warm, copy, fills):
    run = copy('run')
    limit = 20_000 if fills == 'ckpt.pt' else (run / fills).stat().st_size + 100
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    done = warm('train.py', '--init_from=resume', f'--out_dir={run}', '--max_iters=8', disk=limit)
    check(done, 'cannot write')
    assert {path.name for path in run.iterdir()} == set(before)
    for name in ('ckpt.pt', 'ckpt.prev.pt', 'best.pt'):
        assert (run / name).read_bytes() == before[name]
    assert checkpoint.read_latest(run)['iter_num'] == 6


# ---- sample.py and bench.py ----------------------------------------------------------------------


@pytest.mark.parametrize(
    'word, message',
    [
        ('--start=ß', "the character 'ß' at position 0 is not among the"),
        ('--start=', 'the prompt is empty'),
        (
            '--start=FILE:nope.txt',
            "FILE:nope.txt can't be read as UTF-8 text (No such file or directory)",
        ),
        ('--start=FILE:', "FILE: can't be read"),
        ('--start=FILE:/bin/sh', "FILE:/bin/sh can't be read as UTF-8 text"),
        ('--temperature=-1', 'temperature=-1.0 must be at least 0'),
        ('--temperature=hot', "temperature takes a number, not 'hot'"),
        ('--top_k=-1', 'top_k=-1'),
        ('--top_k=0.5', 'top_k takes a whole number, not 0.5'),
        ('--max_new_tokens=-1', 'max_new_tokens=-1 must be at least 0'),
        ('--start=LINES:/dev/null', 'LINES:/dev/null has no line that is not empty'),
        ('--num_samples=0', 'num_samples=0 must be at least 1'),
        ('--seed=-1', 'seed=-1'),
        ('--device=gpu', "device='gpu' is unknown"),
        ('--dtype=float64', "dtype='float64' is unknown"),
        ('--compile=auto', "compile takes True or False, not 'auto'"),
        ('--top_p=1.5', 'top_p=1.5 must be above 0 and at most 1'),
        ('--top_p=0', 'top_p=0.0 must be above 0'),
        ('--min_p=2', 'min_p=2.0 must be at least 0 and at most 1'),
        ('--repetition_penalty=0', 'repetition_penalty=0.0 must be above 0'),
        ('--num_beams=-1', 'num_beams=-1 must be at least 0'),
        (
            '--start=imports in the prompt',
            'the prompt has 21 tokens, the model\'s context 16: shorten it',
        ),
        ('--top_q=0.9', "there is no setting 'top_q'; the nearest is 'top_"),
        ('--out_dir=nowhere', "'nowhere' does not exist"),
        ('--out_dir=data', "'data' holds no checkpoint"),
        ('--init_from=train.py', 'train.py is damaged or not a checkpoint'),
        ('--init_from=gpt2', 'cannot download config.json of openai-community/gpt2'),
    ],
)
def test_sampling(warm, trained, word, message):
    check(
        warm('sample.py', f'--out_dir={trained}', '--max_new_tokens=2', '--device=cpu', word),
        message,
    )


def test_sampling_next_to_temperature_zero(warm, trained):
    done = warm(
        'sample.py',
        f'--out_dir={trained}',
        '--max_new_tokens=2',
        '--device=cpu',
        '--temperature=1e-300',
    )
    assert done.returncode == 0 and done.stderr.startswith('prompts in ')


@pytest.mark.parametrize(
    'words', [('--num_beams=2', '--interactive=True'), ('--num_beams=2', '--start=LINES:README.md')]
)
def test_sampling_in_two_ways_at_once(warm, trained, words):
    done = warm('sample.py', f'--out_dir={trained}', *words)
    check(done, "several prompts, num_beams and interactive=True can't be combined")


@pytest.mark.parametrize(
    'word, message',
    [
        (
            '--dtypes=float32,int4',
            "dtypes='float32,int4': 'int4' is unknown; use some of float32, bfloat16",
        ),
        ('--rounds=0', 'rounds=0 must be at least 1'),
        (
            '--max_new_tokens=1024',
            'prompt_tokens + max_new_tokens = 1025 must be below the context of 1024',
        ),
        ('--model=gtp', "the nearest is 'gpt'"),
    ],
)
def test_benching_generation(warm, word, message):
    check(
        warm('bench.py', 'generation', '--n_layer=1', '--n_embd=12', '--device=cpu', word), message
    )


@pytest.mark.parametrize(
    'word, message',
    [
        ('--steps=0', 'steps=0'),
        ('--profile=2', 'profile takes True or False, not 2'),
        ('nope.py', "there is no config file 'nope.py'"),
        ("--versus='unclosed", 'versus'),
    ],
)
def test_benching(warm, word, message):
    check(warm('bench.py', word), message)
