"""The learner room: encoders, the instant head, fine-tuning, the exam, versions and the served slot."""
