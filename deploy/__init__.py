"""The deploy room: settings, wiring, the command line, the demo and how trimtab ships."""
