"""The command line: `onecopy VERB POOL ...`.

Top layer: it uses nothing but the public API (`import onecopy`), and is alone in importing typer and rich. Each module
holds the verbs of one subject; `main` puts them together and turns errors into exit statuses.
"""
