"""Callbacks for trainers of other libraries, one module for each; imported only where asked for."""
