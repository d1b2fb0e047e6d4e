from shardprune.cli import main

main()
