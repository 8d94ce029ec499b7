"""One self-contained HTML file about runs, or about a recipe before it is launched."""
