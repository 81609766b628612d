"Settings of the documentation site; `docs/build_site.py` lays out the pages and calls Sphinx"
project = 'fspn_nb'
author = 'The fspn_nb authors'
copyright = '2026 onwards, The fspn_nb authors'
extensions = ['myst_nb', 'sphinx_copybutton']
exclude_patterns = ['_build', '**.ipynb_checkpoints']
html_theme = 'furo'
html_title = 'fspn_nb'
html_show_sphinx = False
html_theme_options = {'source_repository': 'https://github.com/fspn-nb/fspn_nb', 'source_branch': 'main', 'source_directory': ''}
html_css_files = ['wide.css']
html_static_path = ['_static']
myst_enable_extensions = ['dollarmath', 'colon_fence', 'attrs_inline']
myst_heading_anchors = 3
nb_execution_mode = 'off' # the stored outputs are shown: they were made by the notebooks themselves
nb_merge_streams = True
suppress_warnings = ['mystnb.unknown_mime_type', 'myst.header', 'misc.highlighting_failure'] # prose starts at the level that reads best
