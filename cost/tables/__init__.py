"""Built-in cost tables, one TOML file each; `cgmq_fx.cost.load` reads them."""
