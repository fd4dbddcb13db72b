"""All that talks to a person: groups of options, the console, result folders, figures."""
