"""`microserve top`: the fleet in a terminal. `model` is pure; `app` polls and switches panes; a module a pane."""
