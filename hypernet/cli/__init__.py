"""The command `hypernet`: one file per subcommand or group of them, put together in main."""
