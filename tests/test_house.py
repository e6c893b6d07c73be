"""The project's own order: which module may know of which, what a text may not say."""
import ast
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = {'train', 'sample', 'bench', 'bench_generation', 'plot', 'compare', 'evaluate', 'export'}
KNOWS = {       # module: the project's modules that it may import
    'configfile': set(), 'confighelp': set(), 'mistakes': set(), 'runtime': {'mistakes'}, 'files': set(),
    'tokenizer': set(), 'layers': set(),
    'optimizer': set(), 'guard': set(), 'parallel': {'fsdp', 'mistakes'}, 'batchnorm': set(), 'chat': set(), 'lora': set(),
    'prompts': {'textfiles'},
    'attention': {'layers'}, 'ngrams': {'layers'},
    'configurator': {'configfile', 'confighelp'},
    'generate': {'tokenizer', 'layers'},
    'weights': {'model'},
    'tokenizer_files': {'tokenizer'}, 'hub': set(), 'vocabulary': {'tokenizer', 'tokenizer_files', 'hub'},
    'huggingface': {'tokenizer_files', 'hub'},
    'model': {'layers', 'optimizer', 'generate', 'huggingface'},
    'models': {'model', 'layers'},
    'shards': {'tokenizer'}, 'dataset': {'shards'}, 'mixture': {'dataset'},
    'conversations': {'chat'},
    'journal': {'files', 'mistakes'}, 'bins': {'files', 'tokenizer', 'chat', 'journal'},
    'textfiles': {'conversations', 'files', 'hub'},
    'sources': {'bins', 'chat', 'conversations', 'files', 'journal', 'mistakes', 'textfiles'},
    'metrics': {'runtime', 'files'},
    'watch': {'files'},
    'fsdp': {'files', 'optimizer'},
    'checkpoint': {'models', 'model', 'dataset', 'tokenizer', 'tokenizer_files', 'files', 'guard', 'huggingface', 'lora',
                   'optimizer', 'fsdp'},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split('.')[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split('.')[0]


def modules():
    return {path.stem: path for path in ROOT.glob('*.py')} | {'models': ROOT / 'models' / '__init__.py'}


@pytest.mark.parametrize('name', sorted(modules()))
def test_arrows_between_modules(name):
    known = set(imports(modules()[name])) & set(modules())
    allowed = set(KNOWS) if name in SCRIPTS else KNOWS[name]
    assert known <= allowed


@pytest.mark.parametrize('path', sorted(ROOT.glob('models/[a-z]*.py')), ids=lambda path: path.stem)
def test_an_architecture_knows_only_what_a_model_is_and_its_parts(path):
    assert set(imports(path)) & set(modules()) <= {'model', 'layers', 'attention', 'batchnorm', 'ngrams'}


@pytest.mark.parametrize('path', sorted(ROOT.glob('config/*.py')), ids=lambda path: path.stem)
def test_a_config_is_short_and_begins_with_its_command(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 24 and f'train.py config/{path.name}' in lines[0]


def test_every_file_of_the_readmes_table_exists():
    readme = (ROOT / 'README.md').read_text()
    first_cells = (line.split('`')[1] for line in readme.splitlines() if line.startswith('| `'))
    named = [cell for cell in first_cells if cell.endswith('.py') and ' ' not in cell]
    assert len(named) >= len(modules()) - 1
    assert all((ROOT / name).exists() for name in named)


def test_no_text_has_a_gap_left_to_fill():
    assert not [path.name for path in ROOT.glob('*.md') if '@' * 2 in path.read_text(encoding='utf-8')]


def test_data_that_was_prepared_is_not_committed():
    if not (ROOT / '.git').exists():
        pytest.skip("not a git checkout")
    tracked = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert not [name for name in tracked if Path(name).suffix in {'.bin', '.pt', '.pkl', '.txt'}
                and not name.startswith('requirements')]
