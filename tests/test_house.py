"""The project's own order: which module may know of which, what a text may not say."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = {'train', 'sample', 'bench', 'bench_generation', 'plot', 'compare', 'evaluate', 'export'}
KNOWS = {  # module: the project's modules that it may import
    'configfile': set(),
    'confighelp': set(),
    'mistakes': set(),
    'runtime': {'mistakes'},
    'files': set(),
    'tokenizer': set(),
    'layers': set(),
    'optimizer': set(),
    'guard': set(),
    'parallel': {'fsdp', 'mistakes'},
    'batchnorm': set(),
    'chat': set(),
    'lora': set(),
    'prompts': {'textfiles'},
    'attention': {'layers'},
    'ngrams': {'layers'},
    'configurator': {'configfile', 'confighelp'},
    'generate': {'tokenizer', 'layers'},
    'weights': {'model'},
    'tokenizer_files': {'tokenizer'},
    'hub': set(),
    'vocabulary': {'tokenizer', 'tokenizer_files', 'hub'},
    'huggingface': {'tokenizer_files', 'hub'},
    'model': {'layers', 'optimizer', 'generate', 'huggingface'},
    'models': {'model', 'layers'},
    'shards': {'tokenizer'},
    'dataset': {'shards', 'mistakes'},
    'mixture': {'dataset'},
    'conversations': {'chat'},
    'journal': {'files', 'mistakes'},
    'bins': {'files', 'tokenizer', 'chat', 'journal', 'mistakes'},
    'textfiles': {'conversations', 'files', 'hub'},
    'sources': {'bins', 'chat', 'conversations', 'files', 'journal', 'mistakes', 'textfiles'},
    'metrics': {'runtime', 'files'},
    'watch': {'files'},
    'fsdp': {'files', 'optimizer'},
    'checkpoint': {
        'models',
        'model',
        'dataset',
        'tokenizer',
        'tokenizer_files',
        'files',
        'guard',
        'huggingface',
        'lora',
        'optimizer',
        'fsdp',
    },
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split('.')[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split('.')[0]


def modules():
    return {path.stem: path for path in ROOT.glob('*.py')} | {
        'models': ROOT / 'models' / '__init__.py'
    }


@pytest.mark.parametrize('name', sorted(modules()))
def test_arrows_between_modules(name):
    known = set(imports(modules()[name])) & set(modules())
    allowed = set(KNOWS) if name in SCRIPTS else KNOWS[name]
    assert known <= allowed


@pytest.mark.parametrize('path', sorted(ROOT.glob('models/[a-z]*.py')), ids=lambda path: path.stem)
def test_an_architecture_knows_only_what_a_model_is_and_its_parts(path):
    assert set(imports(path)) & set(modules()) <= {
        'model',
        'layers',
        'attention',
        'batchnorm',
        'ngrams',
    }


@pytest.mark.parametrize('path', sorted(ROOT.glob('config/*.py')), ids=lambda path: path.stem)
def test_a_config_begins_with_its_command(path):
    first_line = path.read_text(encoding='utf-8').splitlines()[0]
    assert f'train.py config/{path.name}' in first_line


def test_every_file_of_the_readmes_table_exists():
    readme = (ROOT / 'README.md').read_text()
    first_cells = (line.split('`')[1] for line in readme.splitlines() if line.startswith('| `'))
    named = [cell for cell in first_cells if cell.endswith('.py') and ' ' not in cell]
    assert len(named) >= len(modules()) - 1
    assert all((ROOT / name).exists() for name in named)


@pytest.mark.parametrize(
    'path',
    [
        *sorted(ROOT.glob('*.py')),
        *sorted(ROOT.glob('models/*.py')),
        *sorted(ROOT.glob('data/**/*.py')),
    ],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_files_of_text_say_their_encoding(path):
    """Else it is the machine's: cp1252 on Windows, ASCII in a bare container."""
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Call) and opens_text(node):
            assert 'encoding' in {keyword.arg for keyword in node.keywords}, (
                f"{path.name}, line {node.lineno}"
            )


def opens_text(call):
    """Whether a call is open(…), .read_text(…) or .write_text(…) of a file of text."""
    if ast.unparse(call.func) == 'textfiles.read_text':  # which reads UTF-8
        return False
    if isinstance(call.func, ast.Attribute):
        return call.func.attr in ('read_text', 'write_text')
    if not isinstance(call.func, ast.Name) or call.func.id not in ('open', 'fdopen'):
        return False
    mode = ast.unparse(call.args[1]) if len(call.args) > 1 else 'r'
    return 'b' not in mode


def test_every_script_begins_as_one():
    """Before its slow imports, so that Ctrl-C is one line from there on."""
    scripts = [*(ROOT / f'{name}.py' for name in SCRIPTS), *ROOT.glob('data/**/prepare.py')]
    for path in scripts:
        before, call, _ = path.read_text(encoding='utf-8').partition('begin_script()')
        imported = set(re.findall(r'^(?:import|from) (\w+)(?: import .*)?$', before, re.MULTILINE))
        assert call and imported <= {
            'argparse',
            'runpy',
            'sys',
            'time',
            'difflib',
            'hashlib',
            'random',
            're',
            'zipfile',
            'sysconfig',
            'json',
            'os',
            'shlex',
            'shutil',
            'signal',
            'pathlib',
            'mistakes',
        }, path


def test_no_text_has_a_gap_left_to_fill():
    assert not [
        path.name for path in ROOT.glob('*.md') if '@' * 2 in path.read_text(encoding='utf-8')
    ]


def test_data_that_was_prepared_is_not_committed():
    if not (ROOT / '.git').exists():
        pytest.skip("not a git checkout")
    tracked = subprocess.run(
        ['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    assert not [
        name
        for name in tracked
        if Path(name).suffix in {'.bin', '.pt', '.pkl', '.txt'}
        and not name.startswith('requirements')
    ]
