"""The project's own order: which module may know of which, what a text may not say."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
from support.scripts import ROOT, run

FOREIGN = {'NAME.py', 'convert_hf_to_gguf.py'}  # on pages; the second is llama.cpp's
PAGES = [*sorted(ROOT.glob('*.md')), *sorted(ROOT.glob('docs/*.md'))]
SCRIPTS = ['train', 'sample', 'evaluate', 'export', 'bench', 'plot', 'compare']

# Each folder may import itself and what is to the left; `scripts` are the other files of the root.
ORDER = ['system', 'text', 'models', 'interop', 'generation | training', 'scripts']


def sources():
    """The project's own Python files, tests and configs left out."""
    folders = ['system', 'text', 'models', 'interop', 'generation', 'training']
    paths = [*ROOT.glob('*.py')]
    for folder in folders:
        paths += ROOT.glob(f'{folder}/**/*.py')
    return sorted(paths)


def module_name(path):
    """The name by which a file of the project is imported: text.dataset for text/dataset.py."""
    parts = path.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def folder_of(module):
    """The entry of ORDER that a module belongs to; model.py belongs to the models."""
    if module == 'generation.benchmark':  # what `bench.py generation` runs
        return 'scripts'
    first, _, rest = module.partition('.')
    if first == 'model':
        return 'models'
    if not rest and not (ROOT / first).is_dir():
        return 'scripts'
    return next(entry for entry in ORDER if first in entry.split(' | '))


def imports(path, is_lazy=True):
    """The names of the project's modules that a file imports; is_lazy: also inside functions."""
    tree = ast.parse(path.read_text(encoding='utf-8'))
    names = {module_name(source) for source in sources()}
    found = set()
    for node in ast.walk(tree) if is_lazy else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f'{node.module}.{alias.name}' for alias in node.names}
            found |= inside
            if not inside <= names:  # otherwise only modules of a package, not what it defines
                found.add(node.module)
    return found & names - {module_name(path)}


@pytest.mark.parametrize('path', sources(), ids=module_name)
def test_a_folder_imports_only_folders_before_it(path):
    # model.py's methods import the optimizer, decoding and Hugging Face when they are called.
    is_lazy = module_name(path) != 'model'
    own = folder_of(module_name(path))
    for name in imports(path, is_lazy):
        folder = folder_of(name)
        assert ORDER.index(folder) <= ORDER.index(own), f'{module_name(path)} imports {name}'
        if folder == own == 'generation | training':
            assert name.split('.')[0] == path.parent.name, f'{module_name(path)} imports {name}'


def test_no_script_imports_another():
    for script in SCRIPTS:
        assert not imports(ROOT / f'{script}.py') & set(SCRIPTS), script


@pytest.mark.parametrize('path', sorted(ROOT.glob('tests/*.py')), ids=lambda path: path.stem)
def test_no_test_file_imports_another(path):
    """What several need is in tests/support/."""
    others = {other.stem for other in ROOT.glob('tests/*.py')}
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            assert not others & {alias.name for alias in node.names}, f"line {node.lineno}"
        elif isinstance(node, ast.ImportFrom):
            assert node.module not in others, f"line {node.lineno}"


def test_no_module_imports_itself_over_others():
    known = {module_name(path): imports(path, is_lazy=False) for path in sources()}
    while known:
        leaves = [name for name, others in known.items() if not others & known.keys()]
        assert leaves, f"a cycle among {', '.join(sorted(known))}"
        for name in leaves:
            del known[name]


def test_model_py_loads_torch_and_its_own_parts_alone():
    """nanoGPT's import reads GPT-2 without optimizer, decoding and Hugging Face."""
    program = (
        'import sys\n'
        'from model import GPTConfig, GPT\n'
        'GPT(GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=4, vocab_size=5))\n'
        "print(*(name for name in sys.modules if 'torch' not in name))"
    )
    done = run('-c', program)
    loaded = set(done.stdout.split())
    own = {module_name(path) for path in sources()} & loaded
    parts = {f'models.parts.{name}' for name in ('construction', 'kernels', 'kv_cache', 'layers')}
    assert own == {'model', 'models', 'models.parts'} | parts
    assert not loaded & {'transformers', 'safetensors', 'huggingface_hub', 'tiktoken', 'matplotlib'}


@pytest.mark.parametrize('path', sorted(ROOT.glob('models/[a-z]*.py')), ids=lambda path: path.stem)
def test_an_architecture_imports_only_model_and_parts(path):
    for name in imports(path):
        assert name == 'model' or name.startswith('models.parts'), name


@pytest.mark.parametrize('path', sorted(ROOT.glob('config/*.py')), ids=lambda path: path.stem)
def test_a_config_begins_with_its_command(path):
    first_line = path.read_text(encoding='utf-8').splitlines()[0]
    assert f'train.py config/{path.name}' in first_line


@pytest.mark.parametrize(
    'path',
    [*sources(), *sorted(ROOT.glob('data/**/*.py'))],
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
    if ast.unparse(call.func) == 'formats.read_text':  # which reads UTF-8
        return False
    if isinstance(call.func, ast.Attribute):
        return call.func.attr in ('read_text', 'write_text')
    if not isinstance(call.func, ast.Name) or call.func.id not in ('open', 'fdopen'):
        return False
    mode = ast.unparse(call.args[1]) if len(call.args) > 1 else 'r'
    return 'b' not in mode


def test_every_script_begins_as_one():
    """Before its slow imports, so that Ctrl-C is one line from there on."""
    scripts = [ROOT / f'{name}.py' for name in SCRIPTS]
    scripts += [ROOT / 'generation/benchmark.py', *ROOT.glob('data/**/prepare.py')]
    for path in scripts:
        before, call, _ = path.read_text(encoding='utf-8').partition('begin_script()')
        imported = set(
            re.findall(r'^(?:import|from) ([\w.]+)(?: import .*)?$', before, re.MULTILINE)
        )
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
            'system.errors',
        }, path


def test_no_text_has_a_gap_left_to_fill():
    assert not [path.name for path in PAGES if '@' * 2 in path.read_text(encoding='utf-8')]


@pytest.mark.parametrize('page', PAGES, ids=lambda path: path.name)
def test_every_path_on_a_page_exists(page):
    text = page.read_text(encoding='utf-8')
    folders = '|'.join(
        path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != '.'
    )
    named = set(
        re.findall(rf'(?<![\w./-])((?:{folders})/[\w/.-]*\w\.(?:py|c|md|sh|yaml|ipynb|png))', text)
    )
    named |= {name for name in re.findall(r'`(\w+\.py)`', text) if name not in FOREIGN}
    missing = [name for name in named if not (ROOT / name).exists() and 'NAME' not in name]
    assert not [name for name in missing if not list(ROOT.glob(f'*/**/{name}'))]


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
