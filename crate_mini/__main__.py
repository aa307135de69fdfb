"""`python -m crate_mini` names what can be run."""

print("""In the folder of the project, `--help` lists the settings of each:
  python train.py                    train a model
  python interpret.py                look inside a checkpoint
  python steer.py                    steer neurons and read what changes
  python -m crate_mini.studies       measure again what results/ holds""")
