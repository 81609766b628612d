"Reads settings.ini, which is where every fact about the package is kept"
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
extras = {k: shlex.split(cfg[f'{k}_requirements']) for k in ('video', 'onnx', 'gradcam', 'processes', 'cluster', 'hub', 'tensorboard')}
docs = {'docs': shlex.split(cfg['docs_requirements'])} # not part of `dev`: only who builds the site needs it

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], license='Apache-2.0',
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    author=cfg['author'], author_email=cfg['author_email'], keywords=cfg['keywords'], url=cfg['git_url'],
    classifiers=['Programming Language :: Python :: 3 :: Only', 'Intended Audience :: Science/Research',
                 'Topic :: Scientific/Engineering :: Image Recognition'],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[cfg['lib_path'], f"{cfg['lib_path']}.*"]), include_package_data=True,
    package_data={cfg['lib_path']: ['ledger.csv']},
    install_requires=shlex.split(cfg['requirements']),
    extras_require=extras | docs | {'dev': [o for v in (shlex.split(cfg['dev_requirements']), *extras.values()) for o in v]},
    entry_points={'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
                  'console_scripts': shlex.split(cfg['console_scripts'])})
