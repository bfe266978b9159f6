"""How fast trimtab is on this machine, and beside what; see README.md here."""
