"""Work pools and automations of the server of PREFECT_API_URL, as deploy.sh makes them: python -m deployments"""

from deployments import automations, pools

pools.main()
automations.main()
