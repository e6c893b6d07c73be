"""Settings: what the command line and config files may say, who wins, and that nothing is coerced
in silence."""

import dataclasses
import os
import re
import sys
from pathlib import Path

import pytest
from support.generated import HealthCheck, Phase, given, settings, st
from support.scripts import ROOT
from support.settings import gpt, train_settings

import configurator
import models
from configurator import configure

SCRIPT = dict(
    out_dir='out',
    batch_size=12,
    learning_rate=6e-4,
    bias=False,
    device='auto',
    compile='auto',
    model='gpt',
    n_layer=12,
    dropout=0.0,
    always_save_checkpoint=True,
)


def of(*argv, config_class=None, script=SCRIPT):
    """The settings that a script with these defaults ends up with."""
    return configure(
        dict(script),
        [str(word) for word in argv],
        lambda wish: 'cpu' if wish == 'auto' else wish,
        config_class,
    )[0]


@pytest.fixture
def file(tmp_path):
    """file(text, name='config.py') -> the path of a config file with this text."""

    def write(text, name='config.py'):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


# ---- the forms -----------------------------------------------------------------------------------


@pytest.mark.parametrize('words', [['--batch_size=8'], ['--batch_size', '8'], ['batch_size=8']])
def test_three_ways_to_set_one_key(words):
    assert of(*words) == {**of(), 'batch_size': 8}


@pytest.mark.parametrize(
    'words, value',
    [
        ([], []),
        (['--stop='], ''),
        (['--stop=a|b'], 'a|b'),
        (['--stop=3'], '3'),
        (['--stop=[1]'], '[1]'),
        (['--stop=a', '--stop', 'b, c'], ['a', 'b, c']),  # repeated
        (["--stop=['a', 'b|c']"], ['a', 'b|c']),
        (['--stop=("a", )'], ['a']),
        (["--stop=['a']", '--stop=b'], ['a', 'b']),
        (['--stop=()'], '()'),
        ([r"--stop=['\n\n']"], ['\n\n']),
    ],
)
def test_a_setting_of_several_texts(words, value):
    assert of(*words, script={'stop': configurator.Texts()})['stop'] == value


def test_a_config_file_gives_a_text_or_a_list_of_them(file):
    script = {'stop': configurator.Texts()}
    assert of(file("stop = 'a|b'"), script=script)['stop'] == 'a|b'
    assert of(file("stop = ('a', 'b')"), script=script)['stop'] == ['a', 'b']
    assert of(file("stop = ['a']"), '--stop=b', script=script)['stop'] == 'b'
    with pytest.raises(
        ValueError, match=r"config.py: stop takes a text or a list of texts, not \['a', 3\]"
    ):
        of(file("stop = ['a', 3]"), script=script)


@pytest.mark.parametrize('word', ["['a', 'b'", "['a', 3]", "('a')", "['a' 'b']]", '["a"'])
def test_what_begins_like_a_list_of_texts_is_one(word):
    with pytest.raises(
        ValueError, match="begins like a list of texts, but is not one; a list is written --stop="
    ):
        of(f'--stop={word}', script={'stop': configurator.Texts()})


def test_a_repeated_setting_of_another_type_has_its_last_value():
    assert of('--batch_size=3', '--batch_size=4', '--out_dir=a', '--out_dir=b') == {
        **of(),
        'batch_size': 4,
        'out_dir': 'b',
    }


@pytest.mark.parametrize(
    'words, key, value',
    [
        (['--out_dir=a=b'], 'out_dir', 'a=b'),  # everything behind the first = is the value
        (['--out_dir', 'a=b'], 'out_dir', 'a=b'),
        (['--out_dir='], 'out_dir', ''),
        (['--out_dir=two\nlines'], 'out_dir', 'two\nlines'),
        (['--out_dir=123'], 'out_dir', '123'),  # strings stay strings
        (['--out_dir=True'], 'out_dir', 'True'),
        (["--out_dir='quoted'"], 'out_dir', "'quoted'"),
        (['--learning_rate=1'], 'learning_rate', 1.0),  # ints become floats
        (['--learning_rate=1e-4'], 'learning_rate', 1e-4),
        (['--learning_rate', '-1'], 'learning_rate', -1.0),
        (['--batch_size=1_000'], 'batch_size', 1000),
        (['--batch_size=1e3'], 'batch_size', 1000),  # a whole number, as it may be written
        (['--batch_size=4.0'], 'batch_size', 4),
        (['--bias', 'True'], 'bias', True),
        (['--bias=1'], 'bias', True),
        (['--compile=False'], 'compile', False),  # auto settings take their real type too
        (['--compile=auto'], 'compile', 'auto'),
        (['--device=cuda:1'], 'device', 'cuda:1'),
        (['--batch_size=3', '--batch_size=4'], 'batch_size', 4),  # the last one counts
    ],
)
def test_values(words, key, value):
    result = of(*words)[key]
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
    'words, message',
    [
        (['--batch_size=4.5'], 'batch_size takes a whole number, not 4.5'),
        (['--batch_size=1e30'], 'batch_size takes a whole number, not 1e+30'),
        (['--batch_size=True'], 'batch_size takes a whole number, not True'),
        (['--batch_size=four'], "batch_size takes a whole number, not 'four'"),
        (['--batch_size='], "batch_size takes a whole number, not ''"),
        (
            ['--batch_size=9999999999999999999'],
            'batch_size takes a whole number, not 9999999999999999999',
        ),
        (['--bias=2'], 'bias takes True or False, not 2'),
        (['--bias=1.0'], 'bias takes True or False, not 1.0'),
        (['--bias=true'], "bias takes True or False, not 'true'"),
        (['--learning_rate=True'], 'learning_rate takes a number, not True'),
        (['--learning_rate=fast'], "learning_rate takes a number, not 'fast'"),
        (['--learning_rate=nan'], "learning_rate takes a number, not 'nan'"),
        (['--learning_rate=1e999'], 'learning_rate takes a number, not inf'),
        (['--compile=[1]'], 'compile takes auto or a plain value, not [1]'),
        (
            ['--learnin_rate=1'],
            "there is no setting 'learnin_rate'; the nearest is 'learning_rate'",
        ),
        (['--batch_size'], '--batch_size has no value; write --batch_size=VALUE'),
        (['--bias', '--batch_size=4'], '--bias has no value'),
        (
            ['--learning-rate=1'],
            "'--learning-rate=1' is not a setting; they are written --key=value, with _ in the key",
        ),
        (['-batch_size=4'], "'-batch_size=4' is not a setting"),
        (['--', 'x'], "'--' is not a setting"),
        (['--batch_size=', '4'], "there is no config file '4'"),
        (['--configure=1'], "there is no setting 'configure'"),
        (['--__name__=1'], "there is no setting '__name__'"),
    ],
)
def test_mistakes_on_the_command_line(words, message):
    with pytest.raises(
        (ValueError, FileNotFoundError), match='^command line: ' + re.escape(message)
    ):
        of(*words)


# ---- config files --------------------------------------------------------------------------------


def test_files_apply_in_order_and_the_command_line_wins(file):
    one, two = (
        file('batch_size = 1; n_layer = 1; dropout = 1', 'one.py'),
        file('batch_size = 2; n_layer = 2', 'two.py'),
    )
    result = of('--n_layer=9', one, two)
    assert (result['batch_size'], result['n_layer'], result['dropout']) == (2, 9, 1.0)
    assert type(result['dropout']) is float
    assert of(two, one)['batch_size'] == 1


def test_who_set_what_is_known(file):
    path = file('batch_size = 12\nn_layer = 3')
    given = configure(dict(SCRIPT), [path, '--n_layer=3'])[1]
    # also where the value is the default
    assert given == {'batch_size': path, 'n_layer': 'command line'}


def test_a_file_sees_the_device_the_command_line_and_earlier_files(file):
    path = file("n_layer = batch_size\nout_dir = 'out-' + device")
    assert of(path, '--batch_size=5')['n_layer'] == 5
    assert of(file('batch_size = 6', 'first.py'), path)['n_layer'] == 6
    assert of(path)['out_dir'] == 'out-cpu'
    assert of(path, '--device=cuda')['out_dir'] == 'out-cuda'


@pytest.mark.parametrize(
    'text, changed',
    [
        ('import time\nout_dir = f"out-{type(time).__name__}"', {'out_dir': 'out-module'}),
        (
            'from math import sqrt\nfrom pathlib import Path\nbatch_size = int(sqrt(16))',
            {'batch_size': 4},
        ),
        (
            'def double(n):\n    return 2 * n\nclass Sizes:\n    b = 8\nbatch_size = double(Sizes.b)',
            {'batch_size': 16},
        ),
        ('_base = 3\nbatch_size = _base ** 2', {'batch_size': 9}),
        ('for i in range(3):\n    batch_size = i\ndel i', {'batch_size': 2}),
        ('batch_size += 1', {'batch_size': 13}),
        ('batch_size: int = 4', {'batch_size': 4}),
        ('globals()["batch_size"] = 5', {'batch_size': 5}),
        ('globals().update(batch_size=6)', {'batch_size': 6}),
        ('def set_it():\n    global batch_size\n    batch_size = 7\nset_it()', {'batch_size': 7}),
        (
            'from os import path\nn_layer = len(path.basename(__file__))',
            {'n_layer': len('config.py')},
        ),
        ('', {}),
    ],
)
def test_a_file_is_python(file, text, changed):
    assert of(file(text)) == {**of(), **changed}


@pytest.mark.parametrize(
    'text, message',
    [
        (
            'batch_sise = 4',
            "there is no setting 'batch_sise'; the nearest is 'batch_size' (names of the file's own begin with _)",
        ),
        ('batch_size = "8"', "batch_size takes a whole number, not '8'"),
        ('batch_size = True', 'batch_size takes a whole number, not True'),
        ('batch_size = None', 'batch_size takes a whole number, not None'),
        ('batch_size = max', 'batch_size takes a whole number, not <built-in function max>'),
        ('out_dir = 123', 'out_dir takes text, not 123'),
        ('bias = 2', 'bias takes True or False, not 2'),
        ('bias = "True"', "bias takes True or False, not 'True'"),
        ('out_dir = None', 'out_dir takes text, not None'),
        ('compile = None', 'compile takes auto or a plain value, not None'),
        ('import numpy\nbatch_size = numpy.float32(1.5)', 'batch_size takes a whole number, not '),
        (
            'from pathlib import Path\nbatch_size = Path("8")',
            "batch_size takes a whole number, not ",
        ),
        (
            'import numpy\nbatch_size = numpy.zeros((2, 2))',
            'batch_size takes a whole number, not array([[0., 0.], [0., 0.]])',
        ),
        ('learning_rate = float("nan")', 'learning_rate takes a number, not nan'),
        (
            'def f():\n    global batch_size\n    batch_size = 1.5\nf()',
            'batch_size takes a whole number, not 1.5',
        ),
        ('batch_size = 4\nn_layer = = 3', 'line 2: invalid syntax'),
        ('batch_size = 4\n  n_layer = 3', 'line 2: unexpected indent'),
        ('\nimport os\nx = os.environ["NOT_SET"]', "line 3: KeyError: 'NOT_SET'"),
        ('def f():\n    raise RuntimeError("one\\ntwo")\nf()', 'line 2: RuntimeError: one two'),
        ('import nowhere', "line 1: ModuleNotFoundError: No module named 'nowhere'"),
        ('import sys\nsys.exit("done")', 'line 2: SystemExit: done'),
        ('a = 1\x00', 'line 1: '),
        ('gelu = 3', 'gelu takes text, not 3'),
    ],
)
def test_mistakes_in_a_file_name_it(file, text, message):
    path = file(text)
    with pytest.raises(ValueError, match=re.escape(path) + '(:|,) ' + re.escape(message)) as caught:
        of(path, config_class=gpt)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'text, key, value',
    [
        ('batch_size = 1e3', 'batch_size', 1000),
        ('batch_size = 64 / 4', 'batch_size', 16),
        ('learning_rate = 1', 'learning_rate', 1.0),
        ('bias = 1', 'bias', True),
        ('always_save_checkpoint = 0', 'always_save_checkpoint', False),
        (
            'from pathlib import Path\nout_dir = Path("runs") / "one"',
            'out_dir',
            os.path.join('runs', 'one'),
        ),
        ('import numpy as np\nbatch_size = np.int64(8)', 'batch_size', 8),
        ('import numpy as np\nbatch_size = np.sqrt(16)', 'batch_size', 4),
        ('import numpy as np\nlearning_rate = np.float32(0.5)', 'learning_rate', 0.5),
        ('import numpy as np\ndropout = np.int32(0)', 'dropout', 0.0),
        ('import numpy as np\nbias = np.bool_(True)', 'bias', True),
        ('import numpy as np\ncompile = np.bool_(False)', 'compile', False),
        ('import numpy as np\nout_dir = np.str_("out")', 'out_dir', 'out'),
        ('import torch\ndevice = torch.device("cuda", 1)', 'device', 'cuda:1'),
        (
            'import torch\ndevice = torch.device("cuda" if torch.cuda.is_available() else "cpu")',
            'device',
            'cpu',
        ),
        (
            'import torch\nout_dir = torch.bfloat16',
            'out_dir',
            'bfloat16',
        ),  # as a dtype is written here
    ],
)
def test_a_file_may_say_a_value_in_another_type(file, text, key, value):
    """Where it is the same value; what is kept, in checkpoints too, is of the setting's own
    type."""
    found = of(file(text))[key]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    'text, changed',
    [
        ('lr = 1e-3\nlearning_rate = 2 * lr', {'learning_rate': 2e-3}),
        ('base, k = 4, 2\nbatch_size = base * k', {'batch_size': 8}),
        ('batch = 4\nbatch_size = batch', {'batch_size': 4}),
        ('layer = 3\nnum_layers = layer\nn_layer = num_layers', {'n_layer': 3}),
        ('betas = (0.9, 0.95)\nlearning_rate = betas[0]', {'learning_rate': 0.9}),
        ('BATCH_SIZE = 4\nbatch_size = BATCH_SIZE', {'batch_size': 4}),
        ('tokens = 12 * 1024\nprint(f"{tokens} tokens in a step")', {}),
        (
            'total = 0\nfor i, (width, _) in enumerate([(1, 2), (3, 4)]):\n    total += width\nn_layer = total',
            {'n_layer': 4},
        ),
        ('for unused in range(2):\n    batch_size *= 2', {'batch_size': 48}),
        ('with open(__file__) as source:\n    pass', {}),
        ('from math import pi\nfrom sys import maxsize as most', {}),
        ('from math import *\nn_layer = floor(pi)', {'n_layer': 3}),
        ('steps = 5\ndef f():\n    return steps\nn_layer = f()', {'n_layer': 5}),
    ],
)
def test_a_file_may_have_helpers(file, text, changed):
    """A name that it reads again, or that a loop or an import binds, is its own."""
    assert of(file(text), config_class=gpt) == {**of(config_class=gpt), **changed}


@pytest.mark.parametrize(
    'text, key, near',
    [
        ('lr = 1e-3', 'lr', 'learning_rate'),  # never read: it was meant to do something
        ('d_model = 64', 'd_model', 'n_embd'),  # as other programs call it
        ('BATCH_SIZE = 4', 'BATCH_SIZE', 'batch_size'),
        ('n_layers = 6\nbatch_size = n_layers', 'n_layers', 'n_layer'),  # read, but a misspelling
        ('batchsize = 8\nn_layer = batchsize', 'batchsize', 'batch_size'),
        ('learnin_rate = 1e-3\ndropout = learnin_rate', 'learnin_rate', 'learning_rate'),
        ('for n_layers in (1, 2):\n    pass', 'n_layers', 'n_layer'),
        ('from math import pi as droput', 'droput', 'dropout'),
        ('gelus = "tanh"\nout_dir = gelus', 'gelus', 'gelu'),  # the model's fields too
    ],
)
def test_a_name_that_was_meant_for_a_setting(file, text, key, near):
    path = file(text)
    with pytest.raises(
        ValueError, match=re.escape(f"{path}: there is no setting {key!r}; the nearest is '{near}")
    ):
        of(path, config_class=gpt)


@pytest.mark.parametrize(
    'text, key',
    [('comment = "the third try"', 'comment'), ('x = 3', 'x'), ('steps: int = 4', 'steps')],
)
def test_a_name_that_is_like_no_setting_and_is_not_used(file, text, key):
    """Nothing is suggested for it (comment is not compile); what makes it a helper is said."""
    path = file(text)
    message = (
        f"{path}: there is no setting {key!r}, and the file does not use it: a name of its own has to be read in "
        "the file, or begin with _"
    )
    with pytest.raises(ValueError, match='^' + re.escape(message) + '$'):
        of(path, config_class=gpt)


@pytest.mark.parametrize(
    'key, near',
    [
        ('lr', 'learning_rate'),
        ('epochs', 'max_iters'),
        ('steps', 'max_iters'),
        ('bs', 'batch_size'),
        ('seq_len', 'block_size'),
        ('context', 'block_size'),
        ('D_MODEL', 'n_embd'),
        ('num_layers', 'n_layer'),
        ('warmup_steps', 'warmup_iters'),
        ('comment', None),
        ('verbose', None),
    ],
)
def test_what_is_suggested_on_the_command_line(key, near):
    hint = f"; the nearest is {near!r} (--help lists all)" if near else " (--help lists all)"
    with pytest.raises(ValueError) as caught:
        of(f'--{key}=3', config_class=gpt, script=train_settings())
    assert str(caught.value) == f"command line: there is no setting {key!r}{hint}"


def test_what_other_programs_call_a_setting_is_one_here():
    there = {*train_settings(), *sample_settings(), *FIELDS}
    assert set(configurator.ALIASES.values()) - there == set()
    assert configurator.ALIASES.keys() & there == set()


@pytest.mark.parametrize(
    'text, changed',
    [
        ('from numpy import *\nn_layer = int(sqrt(16))', {'n_layer': 4}),
        (
            'from torch import *\nn_layer = 3',
            {'n_layer': 3},
        ),  # which has a compile, a device, a seed
        ('from many import *', {'batch_size': 5, 'gelu': 'tanh'}),
        ('from many import *\nbatch_size = 6', {'batch_size': 6, 'gelu': 'tanh'}),
    ],
)
def test_a_star_import_sets_settings_of_plain_values_only(
    file, tmp_path, monkeypatch, text, changed
):
    """The other names that it binds nobody wrote, whatever setting they are like."""
    file(
        "batch_size = 5\ngelu = 'tanh'\nbatch_sise = n_layers = 7\ncompile = dropout = []\n",
        'many.py',
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'many', raising=False)
    assert of(file(text), config_class=gpt, script=SCRIPT | {'dtype': 'auto'}) == {
        **of(config_class=gpt),
        'dtype': 'auto',
        **changed,
    }


def test_a_setting_that_a_star_import_replaces_is_a_mistake(file):
    with pytest.raises(
        ValueError, match='compile takes auto or a plain value, not <function compile'
    ):
        of(file('compile = False\nfrom torch import *'))


def test_the_data_decide_the_vocabulary(file, capsys, monkeypatch):
    path = file('vocab_size = 50304\nn_layer = 2')
    assert of(path, config_class=gpt)['n_layer'] == 2
    assert (
        capsys.readouterr().out == f"{path}: vocab_size=50304 is ignored: the dataset decides it\n"
    )
    monkeypatch.setenv('RANK', '1')  # said once, by the first process
    of(path, config_class=gpt)
    assert not capsys.readouterr().out
    with pytest.raises(
        ValueError, match="command line: there is no setting 'vocab_size': the dataset decides it"
    ):
        of('--vocab_size=50304', config_class=gpt)


def test_every_setting_of_nanogpt_is_here():
    names = """out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from wandb_log
        wandb_project wandb_run_name dataset gradient_accumulation_steps batch_size block_size n_layer n_head n_embd
        dropout bias learning_rate max_iters weight_decay beta1 beta2 grad_clip decay_lr warmup_iters lr_decay_iters
        min_lr backend device dtype compile"""
    assert set(names.split()) <= train_settings().keys()


# ---- config files that import config files -------------------------------------------------------


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A current folder with config/base.py, which sees the device and has a helper of its own."""
    (tmp_path / 'config').mkdir()
    (tmp_path / 'config' / 'base.py').write_text(
        "width = 3\nn_layer = 2 * width\nout_dir = 'on-' + device\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    'text, changed',
    [
        ('from config.base import *\nn_layer += 1', {'n_layer': 7, 'out_dir': 'on-cpu'}),
        ('from config.base import n_layer', {'n_layer': 6}),
        ('from config.base import n_layer as depth, width', {}),
        ('from config import base\nn_layer = base.n_layer', {'n_layer': 6}),
        ('import config.base\nn_layer = config.base.n_layer', {'n_layer': 6}),
        ('import config.base as base\nn_layer = base.width', {'n_layer': 3}),
        (
            'device = "cuda"\nfrom config.base import *',
            {'device': 'cuda', 'n_layer': 6, 'out_dir': 'on-cuda'},
        ),
        (
            'try:\n    from config.mine import *\nexcept ImportError:\n    n_layer = 1',
            {'n_layer': 1},
        ),
    ],
)
def test_a_file_imports_another(project, file, text, changed):
    assert of(file(text)) == {**of(), **changed}


def test_what_is_imported_counts_as_set_by_the_file_that_says_it(project, file):
    path, base = file('from config.base import *\nn_layer = 3'), str(project / 'config' / 'base.py')
    assert configure(dict(SCRIPT), [path])[1] == {'n_layer': path, 'out_dir': base}


@pytest.mark.parametrize(
    'text',
    [
        'wandb_logg = True',
        'batch_size = "8"',
        'lr = 3',
        'comment = "mine"',
        'import torch\nn_layer = torch',
    ],
)
@pytest.mark.parametrize('way', ['from config.zz import *', 'from config.small.top import *'])
def test_a_mistake_in_an_imported_file_names_that_file(project, file, text, way):
    (project / 'config' / 'small').mkdir()
    (project / 'config' / 'small' / 'top.py').write_text('from config.zz import *\n')
    (project / 'config' / 'zz.py').write_text(text)
    with pytest.raises(ValueError, match='^' + re.escape(f"{project / 'config' / 'zz.py'}: ")):
        of(file(way + '\nbias = True'), script=train_settings())


def test_imports_go_through_several_files_and_leave_no_trace(project, file):
    (project / 'config' / 'small').mkdir()
    (project / 'config' / 'small' / 'top.py').write_text(
        'from config.base import *\nbatch_size = 2\n'
    )
    path = file('from config.small.top import *')
    values = of(path)
    assert (values['n_layer'], values['batch_size']) == (6, 2)
    (project / 'config' / 'base.py').write_text('n_layer = 9\n')
    assert of(path)['n_layer'] == 9  # read anew
    assert not [name for name in sys.modules if name.split('.')[0] == 'config']
    assert not [
        finder for finder in sys.meta_path if type(finder).__module__ == 'system.config_file'
    ]


@pytest.mark.parametrize('where', ['elsewhere', 'repository'])
def test_the_repositorys_configs_can_be_imported(tmp_path, monkeypatch, file, where):
    monkeypatch.chdir(ROOT if where == 'repository' else tmp_path)
    own = of(
        file('from config.train_shakespeare_char import *\nmax_iters = 7'),
        config_class=gpt,
        script=train_settings(),
    )
    assert own['dataset'] == 'shakespeare_char' and own['ngram'] == 5 and own['max_iters'] == 7


@pytest.mark.parametrize(
    'base, message',
    [
        ('lr = 3', "base.py: there is no setting 'lr'; the nearest is 'learning_rate'"),
        ('x = 1 / 0', "base.py, line 1: ZeroDivisionError: division by zero"),
        ('x = = 1', 'base.py, line 1: invalid syntax'),
        (
            'from config.bse import *',
            "base.py, line 1: ModuleNotFoundError: No module named 'config.bse'",
        ),
        ('from config.base import *', 'RecursionError: '),
    ],
)
def test_mistakes_in_what_is_imported(project, file, base, message):
    (project / 'config' / 'base.py').write_text(base)
    with pytest.raises(ValueError, match=re.escape(message)):
        of(file('from config.base import *'))


# ---- mistakes ------------------------------------------------------------------------------------


def test_a_mistake_changes_nothing(file):
    script = dict(SCRIPT)
    with pytest.raises(ValueError):
        configure(script, ['--batch_size=3', file('n_layer = 3\nnope = 1')])
    assert script == SCRIPT


@pytest.mark.parametrize('name', ['nope.py', 'config/nope.py', '.', ''])
def test_a_missing_file(name):
    with pytest.raises(
        FileNotFoundError, match=re.escape(f"command line: there is no config file {name!r}")
    ):
        of(name)


@pytest.mark.parametrize(
    'word, near',
    [
        ('config/train_shakespear.py', 'config/train_shakespeare.py'),
        ('config/train_gpt', 'config/train_gpt2.py'),
        ('train_shakespeare_char.py', 'config/train_shakespeare_char.py'),  # which is in a folder
        ('train_shakespeare_char', 'config/train_shakespeare_char.py'),
        ('{folder}/mine2.py', '{folder}/mine.py'),
    ],
)
@pytest.mark.parametrize('where', [ROOT, None], ids=['repository', 'elsewhere'])
def test_a_missing_file_is_nearly_another(file, tmp_path, monkeypatch, where, word, near):
    file('', 'mine.py')
    monkeypatch.chdir(where or tmp_path)
    near = Path(near.format(folder=tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        of(word.format(folder=tmp_path))
    assert str(caught.value).endswith(f"(the nearest is {near if where else ROOT / near})")


@pytest.mark.parametrize('path', sorted(path.name for path in (ROOT / 'config').glob('*.py')))
@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_every_config_of_the_project_fits_train(path, device):
    script = train_settings()
    values = of(ROOT / 'config' / path, f'--device={device}', config_class=gpt, script=script)
    assert values != script and (
        not values['decay_lr'] or values['min_lr'] <= values['learning_rate']
    )


NANOGPT_STYLE = '''
# fine-tune on Shakespeare; a file as nanoGPT's users write them
import time

out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False # feel free to turn on
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())

dataset = 'shakespeare'
init_from = 'gpt2-xl' # the largest

always_save_checkpoint = False

# 1 batch_size * 32 grad_accum * 1024 tokens = 32,768 tokens/iter
batch_size = 1
gradient_accumulation_steps = 5 * 8
max_iters = 20

learning_rate = 3e-5
decay_lr = False
weight_decay = 1e-1
backend = 'nccl'
device = 'cpu'
compile = False
'''


def sample_settings():
    """The names of sample.py's settings."""
    return re.findall(r'^(\w+) = ', (ROOT / 'sample.py').read_text(), re.MULTILINE)


def test_nanogpts_config_files_run_unchanged(file):
    values = of(file(NANOGPT_STYLE), '--batch_size=2', '--compile=True', script=train_settings())
    assert (
        values['init_from'] == 'gpt2-xl'
        and values['wandb_run_name'].startswith('ft-')
        and values['max_iters'] == 20
    )
    assert (values['batch_size'], values['compile'], values['gradient_accumulation_steps']) == (
        2,
        True,
        40,
    )


def test_nanogpts_command_line_runs_unchanged():
    values = of(
        ROOT / 'config' / 'train_shakespeare_char.py',
        '--device=cpu',
        '--compile=False',
        '--eval_iters=20',
        '--log_interval=1',
        '--block_size=64',
        '--batch_size=12',
        '--n_layer=4',
        '--n_head=4',
        '--n_embd=128',
        '--max_iters=2000',
        '--lr_decay_iters=2000',
        '--dropout=0.0',
        script=train_settings(),
        config_class=lambda values: models.architecture(values['model']).Config,
    )
    assert values['n_embd'] == 128 and values['max_iters'] == 2000 and values['dropout'] == 0.0


# ---- the model's own fields ----------------------------------------------------------------------


def test_a_models_fields_are_flat_keys(file):
    assert of(config_class=gpt)['gelu'] == 'exact'
    assert of('--gelu=tanh', config_class=gpt)['gelu'] == 'tanh'
    assert of(file("gelu = 'tanh'"), config_class=gpt)['gelu'] == 'tanh'
    assert of(file("gelu = 'tanh'"), '--gelu=exact', config_class=gpt)['gelu'] == 'exact'
    # where the script has the key too, its default counts
    assert of(config_class=gpt)['bias'] is False


@dataclasses.dataclass
class MoEConfig:
    n_expert: int = 8
    vocab_size: int = 1
    capacity: float = 1.25


def test_another_models_fields():
    assert (
        of('--n_expert=4', '--capacity=2', config_class=lambda values: MoEConfig)['n_expert'] == 4
    )
    assert type(of('--capacity=2', config_class=lambda values: MoEConfig)['capacity']) is float
    with pytest.raises(ValueError, match='n_expert takes a whole number, not 1.5'):
        of('--n_expert=1.5', config_class=lambda values: MoEConfig)


@pytest.mark.parametrize(
    'words, message',
    [
        (['--n_expert=8'], "there is no setting 'n_expert' (--help lists all)"),
        (['--vocab_size=100'], "there is no setting 'vocab_size'"),  # the data decides it
        (['--model=mamba9'], "model='mamba9' is unknown; the nearest is"),
        (['--model='], "model='' is unknown"),
        (['--model=../model'], "model='../model' is unknown"),
        (['--model=__init__'], "model='__init__' is unknown"),
    ],
)
def test_mistakes_with_a_models_fields(words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        of(*words, config_class=gpt)


# ---- help ----------------------------------------------------------------------------------------


def test_help_lists_every_key_with_default_and_comment(warm):
    done = warm('train.py', '--help', '--batch_size=3')
    assert done.returncode == 0 and done.stderr == ''
    lines = {
        match[1]: match
        for match in re.finditer(r'^  --(\w+)=(.*?)  +(\S.*)$', done.stdout, re.MULTILINE)
    }
    for key, value in train_settings().items():
        assert lines[key][2] == repr(value) and lines[key][3], key
    assert lines['gelu'][2] == "'exact'" and 'tanh' in lines['gelu'][3]


@pytest.mark.parametrize('script', ['sample.py', 'bench.py'])
def test_help_of_the_other_scripts(warm, script):
    done = warm(script, '-h')
    assert done.returncode == 0 and not done.stderr
    # all have comments
    assert not [line for line in done.stdout.splitlines() if re.fullmatch(r'  --\w+=\S+ *', line)]


# ---- fuzz ----------------------------------------------------------------------------------------

KEYS = st.sampled_from(
    [
        *SCRIPT,
        'batch_sise',
        'gelu',
        'block_size',
        'vocab_size',
        '_x',
        '__builtins__',
        'learning-rate',
        '',
    ]
)
TEXTS = st.one_of(
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
    st.booleans().map(str),
    st.sampled_from(
        [
            'auto',
            'None',
            '[]',
            '(1,)',
            '{}',
            '1e999',
            '-0',
            '0x1F',
            '1_0',
            "'8'",
            'cpu',
            '((((',
            '1if 1',
            '\\d',
            '4' * 5000,
            '-' * 3000 + '1',
        ]
    ),
)
WORDS = st.one_of(
    st.tuples(st.sampled_from(['--', '', '-']), KEYS, TEXTS).map(lambda t: f'{t[0]}{t[1]}={t[2]}'),
    KEYS.map('--{}'.format),
    TEXTS,
    st.just('FILE'),
    st.just('FILE'),
)
VALUES = st.one_of(
    TEXTS.map(repr),
    st.integers().map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(str),
    st.booleans().map(str),
    st.sampled_from(
        [
            'None',
            '[1]',
            '{}',
            'b"x"',
            '1j',
            'float("nan")',
            'lambda: 1',
            'int',
            'print',
            'object()',
            '1 / 0',
            'undefined',
            'batch_size + 1',
            'device',
            '10 ** 400',
            '10 ** 5000',
            '"a\\nb"',
            '(yield)',
            '"\\ud800"',
            'exit(3)',
        ]
    ),
)
STATEMENTS = st.one_of(
    st.tuples(KEYS, VALUES).map(lambda t: f'{t[0]} = {t[1]}'),
    st.sampled_from(
        [
            'import time',
            'from math import *',
            'def f():\n    global bias\n    bias = 3',
            'f()',
            '_x = 1',
            'del bias',
            'raise ValueError("one\\ntwo")',
            'raise SystemExit',
            'globals().update(n_layer=2)',
            'if',
            '\t',
            '# é',
            'assert False',
            'class A: pass',
            'del __builtins__',
            'globals().clear()',
        ]
    ),
    st.text(max_size=10),
)


FIELDS = {
    field.name: field.default
    for field in dataclasses.fields(models.architecture('gpt').Config)
    if field.name not in ('vocab_size', *SCRIPT)
}


def check_one(path, words, body):
    """Accepted with every type kept, or one line for the user."""
    path.write_text('\n'.join(body), encoding='utf-8', errors='surrogateescape')
    script = {**SCRIPT, '__doc__': ''}
    before = dict(script)
    try:
        values, given = configure(
            script,
            [str(path) if word == 'FILE' else word for word in words],
            lambda wish: 'cpu' if wish == 'auto' else str(wish),
            lambda values: models.architecture('gpt').Config,
        )
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        assert text.strip() and len(text.splitlines()) == 1 and len(text) < 6000
        assert text.startswith(('command line: ', str(path)))
        assert script == before
        return
    for key, default in {**SCRIPT, **FIELDS}.items():
        plain = configurator.PLAIN if default == 'auto' else (type(default),)
        assert type(values[key]) in plain
        if key not in given and key != 'device':
            assert values[key] == default and type(values[key]) is type(default)
    assert values.keys() == {*SCRIPT, *FIELDS}
    assert {k: script[k] for k in values} == values


FUZZ = dict(
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
LINES = st.lists(
    WORDS.filter(lambda word: word not in ('-h', '--help') and '\0' not in word), max_size=4
)
BODIES = st.lists(STATEMENTS, max_size=4)


@settings(max_examples=400, **FUZZ)
@given(words=LINES, body=BODIES)
def test_fuzz(tmp_path, words, body):
    check_one(tmp_path / 'fuzz.py', words, body)


@pytest.mark.parametrize(
    'broken',
    [
        lambda key, value, default, where: value,
        lambda key, value, default, where: type(default)(value),
        lambda key, value, default, where: {}[key],
        lambda key, value, default, where: default,
    ],
    ids=['takes all', 'coerces', 'traceback', 'ignores'],
)
def test_fuzz_finds_a_broken_check(tmp_path, monkeypatch, broken):
    monkeypatch.setattr(configurator, '_checked', broken)
    look = settings(max_examples=400, phases=[Phase.generate], report_multiple_bugs=False, **FUZZ)(
        given(words=LINES, body=BODIES, key=st.sampled_from([*SCRIPT]), text=TEXTS)(look_once)
    )
    with pytest.raises((AssertionError, KeyError, TypeError, ValueError)):
        look(tmp_path / 'fuzz.py')


def look_once(path, words, body, key, text):
    check_one(path, words, body)
    test_fuzz_one_key.hypothesis.inner_test(key, text)


@pytest.mark.campaign
@settings(max_examples=10_000, **FUZZ)
@given(words=LINES, body=BODIES)
def test_fuzz_campaign(tmp_path, words, body):
    check_one(tmp_path / 'fuzz.py', [*words, 'FILE'] if 'FILE' not in words else words, body)


@settings(max_examples=300, **FUZZ)
@given(key=st.sampled_from([*SCRIPT]), text=TEXTS)
def test_fuzz_one_key(key, text):
    """One key alone: its text is taken as it is, as the literal it is, or not at all."""
    try:
        value = of(f'--{key}={text}')[key]
    except ValueError as error:
        assert str(error).startswith(f'command line: {key} takes ')
        return
    if type(SCRIPT[key]) is str and SCRIPT[key] != 'auto':
        assert value == text
    elif type(value) is not str:
        assert value == eval(text, {}) and (
            type(value) is type(SCRIPT[key]) or SCRIPT[key] == 'auto'
        )


def test_words_too_long_to_be_a_path():
    with pytest.raises(FileNotFoundError, match='there is no config file'):
        of('x' * 100_000)
    assert not os.path.exists('x')
